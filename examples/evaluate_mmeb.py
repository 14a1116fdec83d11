# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---
# %% [markdown]
# # Evaluate a model on MMEB tasks
#
# Score a model on tasks of MMEB with the prompts, candidates and metrics of the published evaluation.
#
#     pip install 'vlm2vec[compact]' && vlm2vec setup compact
#     vlm2vec data fetch mmeb-v1 --data mmeb --task MSCOCO_t2i --task VOC2007    # downloads from the Hugging Face hub
#     python evaluate_mmeb.py
#
# Without the data, the script writes two small tasks of drawn shapes in the same layout and a benchmark file
# for them. Their scores say nothing about MMEB; they show that everything works.

# %% tags=["parameters"]
MODELS = ["compact", "compact-dual"]  # built-in models, runs, folders or hub ids
BENCHMARK = "mmeb-v1"  # or mmeb-v2, mmeb-v3, or a benchmark file of your own
DATA = "mmeb"
TASKS = ["MSCOCO_t2i", "VOC2007"]
OUTPUT = "runs/scores"

# %%
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw, ImageFont

from vlm2vec.cli import run
from vlm2vec.jobs.demo_store import draw_images


def vlm2vec(*words):
    """Runs a command as in a terminal, in this process; a failed command ends the script."""
    if run([str(word) for word in words]):
        raise SystemExit(f"vlm2vec {words[0]} failed")


COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def write_task(name, rows):
    """Writes rows in the layout of TIGER-Lab/MMEB-eval; the first candidate of a row is the correct one."""
    file = Path(DATA, name, "test-00000-of-00001.parquet")
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table({key: [row[key] for row in rows] for key in COLUMNS}), file)


if not Path(DATA).exists():
    table = draw_images(Path(DATA, "drawn"))
    shapes = [row for row in map(json.loads, table.read_text().splitlines()) if row["count"] == 1]
    kinds = sorted({row["shape"] for row in shapes})
    draws = random.Random(0)
    find, name_it = [], []
    for row in draws.sample(shapes, 40):
        others = draws.sample([other for other in shapes if other is not row], 9)
        paths = [f"drawn/{each['image']}" for each in (row, *others)]
        ask = f"Find me an everyday image that matches the given caption. A {row['name']}.\n"
        texts = ["<|image_1|>\nRepresent the given image.\n"] * len(paths)
        find.append(dict(zip(COLUMNS, (ask, "", texts, paths), strict=True)))
        labels = [row["shape"], *(kind for kind in kinds if kind != row["shape"])]
        ask = "<|image_1|>\nIdentify the object shown in the image.\n"
        name_it.append(dict(zip(COLUMNS, (ask, paths[0], labels, [""] * len(labels)), strict=True)))
    write_task("Find", find)
    write_task("Name", name_it)
    facts = {"reader": "mmeb", "metric": "hit@1", "num_queries": 40}
    tasks = {"Find": {"meta_task": "retrieval", **facts}, "Name": {"meta_task": "classification", **facts}}
    BENCHMARK, TASKS = "shapes.yaml", list(tasks)
    Path(BENCHMARK).write_text(yaml.safe_dump({"name": "shapes", "tasks": tasks}))

# %% [markdown]
# ## Score the models
#
# `eval` writes `results.json`, a Markdown table, a leaderboard file and a page with every query. It continues
# after a kill, and embeddings are cached by content, so a second evaluation that shares inputs is faster.

# %%
for model in MODELS:
    chosen = [word for task in TASKS for word in ("--task", task)]
    vlm2vec("eval", model, "--benchmark", BENCHMARK, "--data", DATA, *chosen, "-o", f"{OUTPUT}/{Path(model).name}")

# %% [markdown]
# ## Compare them
#
# `vlm2vec report FOLDER ... -o REPORT` puts runs beside the published scores. Here the scores are read from
# the results.

# %%
scores = {model: json.loads(Path(OUTPUT, Path(model).name, "results.json").read_text())["tasks"] for model in MODELS}
for model, tasks in scores.items():
    print(model, {task: round(100 * found["score"], 1) for task, found in tasks.items()})

# %%
WIDTH, BAR, FONT = 640, 22, ImageFont.load_default(13)
chart = Image.new("RGB", (WIDTH, len(TASKS) * (len(MODELS) * BAR + 36) + 10), "white")
draw = ImageDraw.Draw(chart)
for place, task in enumerate(TASKS):
    top = place * (len(MODELS) * BAR + 36) + 8
    draw.text((10, top), f"{task}, hit@1 in percent", "black", FONT)
    for line, model in enumerate(MODELS):
        y, share = top + 22 + line * BAR, scores[model][task]["score"]
        draw.text((10, y), model, "black", FONT)
        draw.rectangle((160, y, 160 + 400 * share, y + BAR - 5), fill=("steelblue", "darkorange")[line % 2])
        draw.text((166 + 400 * share, y), f"{100 * share:.1f}", "black", FONT)
chart.save("evaluate_mmeb.png")
