from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vec.errors import UserError
from vlm2vec.media.images import ImageRef
from vlm2vec.models.prompts import PromptTemplate, split_at_images
from vlm2vec.types import EmbeddingInput

IMAGE = ImageRef(path="a.png")


def render(text: str | None, num_images: int = 0, instruction: str | None = None) -> str:
    return PromptTemplate().render(EmbeddingInput(text, (IMAGE,) * num_images, instruction))


def test_a_text_with_a_placeholder_is_the_prompt_verbatim():
    text = "  <|image_1|> Represent the given image.\n\n"
    assert render(text, 1) == text
    assert render(text, 1, instruction="left out") == text


def test_other_inputs_are_images_then_instruction_then_text():
    assert render("a dog", 2, "Find it.") == "<|image_1|>\n<|image_2|>\nFind it. a dog\n"
    assert render("a dog", 1) == "<|image_1|>\na dog\n"
    assert render(None, 1, "Find it.") == "<|image_1|>\nFind it.\n"
    assert render(None, 1) == "<|image_1|>\n"
    assert render("a dog", instruction="Find it.") == "Find it. a dog"
    assert render("a dog") == "a dog"


def test_a_template_says_how_the_parts_are_joined():
    template = PromptTemplate(image="[{image}]", instruction="({instruction})", separator="|", suffix="!")
    assert template.render(EmbeddingInput("t", (IMAGE,), "i")) == "[<|image_1|>](i)|t!"


def test_images_may_be_named_in_any_order_and_more_than_once():
    assert split_at_images(render("b <|image_2|><|image_1|> <|image_2|>", 2)) == ["b ", 1, 0, " ", 1]


@pytest.mark.parametrize(
    ("text", "num_images"), [("<|image_1|>", 0), ("<|image_1|>", 2), ("<|image_2|>", 1), ("<|image_0|>", 1)]
)
def test_placeholders_that_do_not_match_the_images_are_one_clear_error(text, num_images):
    with pytest.raises(UserError, match=f"but {num_images} images; expected one") as caught:
        render(text, num_images)
    assert "\n" not in str(caught.value)


@given(st.lists(st.one_of(st.integers(1, 9), st.text(alphabet="ab <|_\n", min_size=1))))
def test_splitting_a_prompt_loses_nothing(parts):
    prompt = "".join(f"<|image_{part}|>" if isinstance(part, int) else part for part in parts)
    pieces = split_at_images(prompt)
    assert "".join(f"<|image_{p + 1}|>" if isinstance(p, int) else p for p in pieces) == prompt
    assert "" not in pieces
