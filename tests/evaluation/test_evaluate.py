"""Evaluation with encoders whose score is known in advance."""

import json
from pathlib import Path

import pytest
from evaluation.toys import COLOURS, NUM_FIND, ColourEncoder, ConstantEncoder, RandomEncoder

from vlm2vec.errors import UserError
from vlm2vec.evaluation.benchmark import Benchmark
from vlm2vec.evaluation.evaluate import evaluate, images_of, num_inputs, read_results, results_json
from vlm2vec.types import EvalQuery

Toy = tuple[Benchmark, dict[str, list[EvalQuery]]]


def test_an_encoder_that_knows_scores_one(toy: Toy) -> None:
    assert [result.score for result in evaluate(ColourEncoder(), *toy)] == [1.0, 1.0]


def test_an_encoder_that_guesses_scores_about_chance(toy: Toy) -> None:
    runs = [evaluate(RandomEncoder(seed), *toy)[0] for seed in range(20)]
    assert runs[0].chance == pytest.approx(0.1)
    # 1200 guesses, not quite independent: three standard deviations of independent ones are 0.026.
    assert sum(run.score for run in runs) / len(runs) == pytest.approx(0.1, abs=0.04)


def test_an_encoder_that_gives_one_vector_for_everything_scores_zero(toy: Toy) -> None:
    assert [result.score for result in evaluate(ConstantEncoder(), *toy)] == [0.0, 0.0]


def test_each_distinct_input_is_encoded_exactly_once(toy: Toy) -> None:
    encoder = ColourEncoder()
    done: list[int] = []
    evaluate(encoder, *toy, progress=done.append)
    # 60 texts; 10 images, candidates of one task and queries of the other; 10 names.
    assert len(encoder.seen) == len(set(encoder.seen)) == NUM_FIND + 2 * len(COLOURS)
    assert sum(done) == sum(map(num_inputs, toy[1].values()))


def test_a_result_knows_its_sizes_and_a_few_samples_from_first_to_last_query(toy: Toy) -> None:
    benchmark, tasks = toy
    find = evaluate(ColourEncoder(), benchmark, tasks)[0]
    assert (find.num_queries, find.num_candidates) == (NUM_FIND, 10)
    assert len(find.samples) == 5
    assert find.samples[0].query == tasks["Find"][0].query
    assert find.samples[-1].query == tasks["Find"][-1].query
    for sample in find.samples:
        candidate, cosine, is_gold = sample.top[0]
        assert (candidate, cosine, is_gold) == (sample.gold, 1.0, True)
        assert [gold for _, _, gold in sample.top[1:]] == [False] * 4


def test_results_have_the_documented_keys(toy: Toy) -> None:
    benchmark, tasks = toy
    content = results_json("toy model", benchmark, evaluate(ColourEncoder(), benchmark, tasks))
    assert (content["model"], content["benchmark"]) == ("toy model", "colours")
    assert list(content["tasks"]) == ["Find", "Name"]
    assert {"metric", "score", "num_queries", "num_candidates"} <= set(content["tasks"]["Find"])
    assert content["groups"] == {"classification": 1.0, "retrieval": 1.0, "ind": 1.0, "ood": 1.0, "overall": 1.0}
    assert json.loads(json.dumps(content)) == content


def test_all_images_of_the_tasks_are_listed(toy: Toy) -> None:
    images = list(images_of(toy[1]))
    assert len(images) == 10 + 10
    assert all(image.exists() for image in images)


def test_a_folder_without_results_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json.*vlm2vec eval"):
        read_results(tmp_path)
