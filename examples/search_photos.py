# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---
# %% [markdown]
# # Search your photos
#
# Index a folder of photos once, then search it by text, by image, and by both together.
#
#     pip install 'vlm2vec[compact,index]' && vlm2vec setup compact
#     python search_photos.py
#
# Without a folder at `PHOTOS`, the script draws 172 images of shapes, so that it runs anywhere. For real
# photos, set `MODEL` to a stronger model, such as `VLM2Vec/VLM2Vec-V2.0`: the built-in one is small.

# %% tags=["parameters"]
PHOTOS = "photos"  # a folder; subfolders are read, too
MODEL = "compact"  # a built-in model, a folder that `vlm2vec train` wrote, or a hub id
STORE = "photos.lance"

# %%
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm2vec.cli import run
from vlm2vec.jobs.demo_store import draw_images
from vlm2vec.jobs.searching import Query, Searcher, image_ref
from vlm2vec.jobs.stores import load_model_of
from vlm2vec.media.images import ImageRef
from vlm2vec.retrieval.open import open_store


def vlm2vec(*words):
    """Runs a command as in a terminal, in this process; a failed command ends the script."""
    if run([str(word) for word in words]):
        raise SystemExit(f"vlm2vec {words[0]} failed")


photos = Path(PHOTOS)
is_drawn = not photos.exists()
if is_drawn:
    photos = draw_images(Path("drawn")).parent

# %% [markdown]
# ## Index
#
# This is the command `vlm2vec index MODEL PHOTOS --store STORE`. Run it again at any time: only new and
# changed files are encoded, and a killed run continues.

# %%
vlm2vec("index", MODEL, str(photos), "--store", STORE)

# %% [markdown]
# ## Search
#
# The store names its model, so a search needs no other setting. A query is a text, an image, or both.

# %%
store = open_store(STORE)
searcher = Searcher(load_model_of(store), store)
example = ImageRef.of(photos / "red-star.png" if is_drawn else next(photos.rglob("*.jpg")))
queries = [
    Query("a yellow heart"),
    Query("blue hearts"),
    Query(image=example),
    Query("the same in green", example),
]
answers = [searcher.search(query, k=5, where="v2v_modality = 'image'") for query in queries]
for query, hits in zip(queries, answers, strict=True):
    print(query)
    for hit in hits:
        print(f"  {hit.score:.3f}  {Path(hit.key).name}")

# %% [markdown]
# ## Look at the results
#
# One row for each query, best match first.

# %%
SIDE, FONT = 110, ImageFont.load_default(13)


def contact_sheet(rows, headings):
    """Returns one image with a heading and a row of images for each query."""
    sheet = Image.new("RGB", (5 * (SIDE + 6) + 6, len(rows) * (SIDE + 30)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (heading, images) in enumerate(zip(headings, rows, strict=True)):
        draw.text((6, row * (SIDE + 30) + 6), heading, "black", FONT)
        for column, image in enumerate(images):
            image.thumbnail((SIDE, SIDE))
            sheet.paste(image, (6 + column * (SIDE + 6), row * (SIDE + 30) + 25))
    return sheet


def heading_of(query):
    return " + ".join(part for part in (query.text, query.image and Path(query.image.path).name) if part)


rows = [[image_ref(hit.metadata).load() for hit in hits] for hits in answers]
contact_sheet(rows, [heading_of(query) for query in queries]).save("search_photos.png")
store.close()
