# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---
# %% [markdown]
# # Ask a folder of PDFs
#
# Visual document retrieval: every page is embedded as an image, so tables, figures and scans need neither OCR
# nor a text layer. A question returns the pages that answer it, as images.
#
#     pip install 'vlm2vec[compact,index,pdf]' && vlm2vec setup compact
#     python ask_pdfs.py
#
# Without a folder at `PDFS`, the script makes three catalogues with images. The built-in model recognizes their
# drawings but cannot read print. For real documents, set `MODEL` to a model that was trained on pages, such
# as `VLM2Vec/VLM2Vec-V2.0`.

# %% tags=["parameters"]
PDFS = "pdfs"
MODEL = "compact"
STORE = "pages.lance"
QUESTIONS = ["Which page shows an orange heart?", "a moon", "Where is the red star?"]

# %%
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm2vec.cli import run
from vlm2vec.jobs.demo_store import COLOURS, draw_images
from vlm2vec.jobs.searching import Query, Searcher, image_ref
from vlm2vec.jobs.stores import load_model_of
from vlm2vec.retrieval.open import open_store


def vlm2vec(*words):
    """Runs a command as in a terminal, in this process; a failed command ends the script."""
    if run([str(word) for word in words]):
        raise SystemExit(f"vlm2vec {words[0]} failed")


def page(drawing, heading, number):
    """Returns a page of a catalogue: a heading, a drawing and a page number."""
    canvas = Image.new("RGB", (420, 594), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((40, 30), heading, "black", ImageFont.load_default(22))
    canvas.paste(Image.open(drawing).resize((340, 340)), (40, 90))
    draw.text((40, 550), f"page {number}", "gray", ImageFont.load_default(14))
    return canvas


pdfs = Path(PDFS)
if not pdfs.exists():
    pdfs.mkdir()
    drawings = draw_images(Path("drawn")).parent
    for shape in ("heart", "moon", "star"):
        pages = [
            page(drawings / f"{colour}-{shape}.png", f"The {shape}, plate {number}", number)
            for number, colour in enumerate(COLOURS, start=1)
        ]
        pages[0].save(pdfs / f"{shape}.pdf", save_all=True, append_images=pages[1:])

# %% [markdown]
# ## Index the pages
#
# Each page becomes one row of the store, with the file and the page number as metadata.

# %%
vlm2vec("index", MODEL, str(pdfs), "--store", STORE)

# %% [markdown]
# ## Ask
#
# The answer is a list of pages with their scores. To let a vision-language model read the best pages and put
# them in a better order, use `Reranker` or `vlm2vec search --rerank MODEL`.

# %%
store = open_store(STORE)
searcher = Searcher(load_model_of(store), store)
answers = [searcher.search(Query(question), k=3) for question in QUESTIONS]
for question, hits in zip(QUESTIONS, answers, strict=True):
    print(question)
    for hit in hits:
        print(f"  {hit.score:.3f}  {Path(hit.metadata['v2v_path']).name}, page {hit.metadata['v2v_page']}")

# %% [markdown]
# ## The pages
#
# `image_ref(hit.metadata).load()` renders a page of the PDF as a PIL image, to show it or to hand it to a
# chat model.

# %%
WIDTH, HEIGHT, FONT = 150, 212, ImageFont.load_default(14)
sheet = Image.new("RGB", (len(QUESTIONS) * (2 * WIDTH + 30), HEIGHT + 60), "white")
draw = ImageDraw.Draw(sheet)
for column, (question, hits) in enumerate(zip(QUESTIONS, answers, strict=True)):
    left = column * (2 * WIDTH + 30) + 8
    draw.text((left, 8), question, "black", FONT)
    for place, hit in enumerate(hits[:2]):
        image = image_ref(hit.metadata).load()
        image.thumbnail((WIDTH, HEIGHT))
        x = left + place * (WIDTH + 6)
        sheet.paste(image, (x, 30))
        draw.rectangle((x, 30, x + image.width, 30 + image.height), outline="gray")
        draw.text((x, HEIGHT + 36), f"{hit.score:.3f}", "black", FONT)
sheet.save("ask_pdfs.png")
store.close()
