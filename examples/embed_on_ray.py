# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---
# %% [markdown]
# # Embed a million images on a Ray cluster
#
# Workers on several machines share the parts of one job. Every finished part is kept, so a killed job or a
# lost worker repeats one part only.
#
#     pip install 'vlm2vec[compact,ray]' && vlm2vec setup compact
#     python embed_on_ray.py
#
# On a cluster (`ray start --head` on one machine, `ray start --address=HOST:6379` on the others), set
# `ADDRESS`, and put `IMAGES` and `OUTPUT` on a file system that all machines see. Without a folder at
# `IMAGES`, the script packs 172 drawn images into tar archives and uses two workers on this machine.

# %% tags=["parameters"]
IMAGES = "images"  # a folder, a table, or tar and zip archives, which are read in place
MODEL = "compact"
OUTPUT = "vectors.parquet"
WORKERS = 2  # one for each GPU of the cluster
GPUS = 0  # GPUs of each worker
ADDRESS = None  # such as "10.0.0.5:6379"; None starts Ray on this machine
PART = 64  # inputs of a part; 1,024 (the default of the command) suits large jobs

# %%
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from vlm2vec.cli import run
from vlm2vec.jobs.demo_store import draw_images


def vlm2vec(*words):
    """Runs a command as in a terminal, in this process; a failed command ends the script."""
    if run([str(word) for word in words]):
        raise SystemExit(f"vlm2vec {words[0]} failed")


images = Path(IMAGES)
if not images.exists():
    images.mkdir()
    files = sorted(draw_images(Path("drawn")).parent.glob("*.png"))
    for shard in range(2):
        with tarfile.open(images / f"{shard:05d}.tar", "w") as archive:
            for file in files[shard::2]:
                archive.add(file, file.name)

# %% [markdown]
# ## Embed
#
# One job for each archive or folder. Start a killed job again with the same command: it continues. Inputs
# that cannot be read are listed in `errors.jsonl` and never stop the job.

# %%
start = time.perf_counter()
outputs = []
for source in sorted(images.glob("*.tar")) or [images]:
    output = Path(OUTPUT).with_name(f"{Path(OUTPUT).stem}-{source.stem}.parquet")
    words = ["embed", MODEL, str(source), "-o", str(output), "--engine", "ray", "--part", str(PART)]
    words += ["--workers", str(WORKERS), "--gpus", str(GPUS), *(["--address", ADDRESS] if ADDRESS else [])]
    vlm2vec(*words)
    outputs.append(output)
seconds = time.perf_counter() - start

# %% [markdown]
# ## Read the vectors
#
# A row has the key of its input, the vector, and metadata. For the time of a million images on your GPUs, see
# `vlm2vec plan RECIPE --encode 1000000 --gpu h100 --count 8`. A million vectors of 384 float32 numbers take
# 1.5 GB; `--precision int8` takes a quarter of that.

# %%
table = pq.ParquetDataset([str(output) for output in outputs]).read()
vectors_ND = np.stack(table["vector"].to_numpy(zero_copy_only=False))
print(f"{len(vectors_ND)} vectors of {vectors_ND.shape[1]} dimensions from {len(outputs)} archives")
print(f"{seconds:.0f} s with {WORKERS} workers, {len(outputs)} starts of Ray included")

# %% [markdown]
# ## Look at them
#
# The two directions of greatest variance; near points have near vectors. `vlm2vec map` makes a better map of
# a store.

# %%
SIZE, SIDE = 720, 40
centred_ND = vectors_ND - vectors_ND.mean(axis=0)
places_N2 = centred_ND @ np.linalg.svd(centred_ND, full_matrices=False)[2][:2].T
places_N2 = (places_N2 - places_N2.min(axis=0)) / np.ptp(places_N2, axis=0) * (SIZE - SIDE)
canvas = Image.new("RGB", (SIZE, SIZE), "white")
for place, path, member in zip(
    places_N2, *(table[f"v2v_{name}"].to_pylist() for name in ("path", "member")), strict=True
):
    with tarfile.open(path) as archive:
        image = Image.open(archive.extractfile(member)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    canvas.paste(image, (int(place[0]), int(place[1])))
ImageDraw.Draw(canvas).rectangle((0, 0, SIZE - 1, SIZE - 1), outline="gray")
canvas.save("embed_on_ray.png")
