"""Vision: caches of encoder outputs, frozen encoders, pixel values as bytes, image sizes."""
