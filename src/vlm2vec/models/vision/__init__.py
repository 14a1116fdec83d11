"""The vision side: caches of its outputs, a frozen encoder, pixels as bytes, image sizes."""
