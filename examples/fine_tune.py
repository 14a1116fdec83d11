# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---
# %% [markdown]
# # Fine-tune on your own pairs
#
# Turn a table of pairs (here captions and images) into an embedding model that finds one by the other.
#
#     pip install 'vlm2vec[compact]' && vlm2vec setup compact
#     python fine_tune.py
#
# Without a table at `PAIRS`, the script draws 172 images of shapes and describes them. It trains the small
# built-in model on a CPU in minutes. On a GPU, set `BASE` to a larger model, such as
# `Qwen/Qwen3-VL-2B-Instruct`, and remove `SETTINGS`: the defaults follow the model and the data.

# %% tags=["parameters"]
PAIRS = "pairs.jsonl"  # columns such as text and image; the page "Your own data" lists the accepted names
BASE = "compact"
OUTPUT = "runs/mine"
SETTINGS = ["train.steps=60", "train.batch_size=32"]

# %%
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlm2vec import Embedder
from vlm2vec.cli import run
from vlm2vec.jobs.demo_store import draw_images


def vlm2vec(*words):
    """Runs a command as in a terminal, in this process; a failed command ends the script."""
    if run([str(word) for word in words]):
        raise SystemExit(f"vlm2vec {words[0]} failed")


if not Path(PAIRS).exists():
    table = draw_images(Path("drawn"))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    pairs = [{"text": row["name"], "image": f"drawn/{row['image']}"} for row in rows]
    Path(PAIRS).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

# %% [markdown]
# ## Train
#
# One command checks every row, holds out a tenth of the pairs, scores them, trains with LoRA, and scores them
# again. Each held-out caption ranks all held-out images; the score is the share of captions whose own image
# comes first (hit@1).

# %%
vlm2vec("train", PAIRS, "--base", BASE, "-o", OUTPUT, *SETTINGS)

# %% [markdown]
# ## Check
#
# `verify` computes the vectors of a few inputs again and compares them with those that were saved with the
# model.

# %%
vlm2vec("verify", OUTPUT)

# %% [markdown]
# ## Use the model
#
# Load it by its folder, here or with sentence-transformers. `vlm2vec push runs/mine OWNER/NAME` uploads it
# with a model card.

# %%
rows = [json.loads(line) for line in Path(PAIRS).read_text().splitlines()][:60]
images = [Path(PAIRS).parent / row["image"] for row in rows]
captions = [row["text"] for row in rows][:: max(1, len(rows) // 4)][:4]
model = Embedder.from_pretrained(OUTPUT)
scores = model.similarity(model.encode_query(captions), model.encode_document(images))
for caption, row in zip(captions, scores, strict=True):
    best = int(row.argmax())
    print(f"{caption!r} -> {images[best].name} ({float(row[best]):.3f})")

# %% [markdown]
# ## Look at the results
#
# The four images nearest to each caption. `runs/mine/report.html` has the curves of the run.

# %%
SIDE, FONT = 110, ImageFont.load_default(13)
sheet = Image.new("RGB", (4 * (SIDE + 6) + 6, len(captions) * (SIDE + 30)), "white")
draw = ImageDraw.Draw(sheet)
for place, (caption, row) in enumerate(zip(captions, scores, strict=True)):
    top = place * (SIDE + 30)
    draw.text((6, top + 6), caption, "black", FONT)
    best = sorted(range(len(images)), key=lambda index, row=row: -float(row[index]))[:4]
    for column, index in enumerate(best):
        image = Image.open(images[index]).convert("RGB")
        image.thumbnail((SIDE, SIDE))
        sheet.paste(image, (6 + column * (SIDE + 6), top + 25))
sheet.save("fine_tune.png")
