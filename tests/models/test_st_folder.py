from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny.models import draw_image

from vlm2vec import Embedder
from vlm2vec.models import st_folder
from vlm2vec.models.backbones.generic import Generic
from vlm2vec.models.checkpoints import folder as checkpoint
from vlm2vec.models.prompts import PromptTemplate
from vlm2vec.types import EmbeddingInput

SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

WIDE, SMALL = draw_image(60, 30, 1), draw_image(33, 41, 2)
TASK = "Represent the given image for classification"
# (ours, theirs): a dict with instruction becomes their prompt.
PLAIN = [
    "a dog on the beach",
    {"image": WIDE},
    {"image": SMALL, "text": "what is left of it?"},
    {"images": [WIDE, SMALL], "text": "which of them is red? " * 5},
    {"text": "<|image_1|>\nRepresent the given image.\n", "image": SMALL},
    {"text": "first <|image_1|> then <|image_2|> end", "images": [SMALL, WIDE]},
]
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}<answer>"
)


def theirs(value):
    """Our input as sentence-transformers takes it."""
    if isinstance(value, str):
        return value
    return {"image" if key == "images" else key: part for key, part in value.items()}


def open_in_st(folder: Path, **settings) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, **settings)


def load(folder: Path, **settings) -> Embedder:
    return Embedder.from_pretrained(folder, dtype=torch.float32, device="cpu", **settings)


def assert_equal(ours: np.ndarray, others: np.ndarray) -> None:
    cosines = (ours * others).sum(axis=1)
    assert cosines.min() >= 0.9999, cosines
    np.testing.assert_allclose(np.linalg.norm(others, axis=1), 1, rtol=1e-4)


@pytest.fixture(scope="module", params=["llava", "idefics3", "llava_next", "gemma3", "aya_vision"])
def saved(request, tiny_vlm, tmp_path_factory) -> tuple[Embedder, Path]:
    golden = Path(__file__).parents[1] / "golden/llava-next/base"
    embedder = load(golden if request.param == "llava_next" else tiny_vlm(request.param))
    folder = tmp_path_factory.mktemp("st") / request.param
    embedder.prompts = {"query": TASK}
    embedder.save_pretrained(folder)
    return embedder, folder


def test_a_saved_folder_gives_equal_vectors_in_sentence_transformers(saved):
    embedder, folder = saved
    model = open_in_st(folder)
    expected = embedder.encode(PLAIN)
    assert_equal(expected, model.encode([theirs(value) for value in PLAIN], batch_size=4))
    assert np.abs(expected @ expected.T - np.eye(len(PLAIN)))[np.triu_indices(len(PLAIN), 1)].max() < 0.9999
    assert model.get_embedding_dimension() == embedder.embedding_dim


def test_an_instruction_is_the_prompt_there_and_prompts_travel_with_the_folder(saved):
    embedder, folder = saved
    model = open_in_st(folder)
    assert_equal(
        embedder.encode(PLAIN[:4], instruction="Find it."),
        model.encode([theirs(value) for value in PLAIN[:4]], prompt="Find it."),
    )
    assert_equal(embedder.encode_query(PLAIN[:3]), model.encode_query([theirs(value) for value in PLAIN[:3]]))
    assert_equal(load(folder).encode_query(PLAIN[:3]), embedder.encode(PLAIN[:3], instruction=TASK))


@pytest.mark.parametrize(
    "value",
    [
        {"text": "<|image_2|> and <|image_1|>", "image": [WIDE, SMALL]},
        {"text": "<|image_1|> twice <|image_1|>", "image": [WIDE]},
        {"text": "<|image_2|> only", "image": [WIDE]},
    ],
)
def test_what_sentence_transformers_cannot_express_is_refused_there(saved, value):
    with pytest.raises(Exception, match="image"):
        open_in_st(saved[1]).encode([value])


def test_the_folder_does_not_need_its_base(tiny_vlm, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_vlm("llava").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    embedder = load(base)
    embedder.save_pretrained(tmp_path / "saved")
    for file in base.iterdir():
        file.unlink()
    np.testing.assert_allclose(load(tmp_path / "saved").encode(PLAIN), embedder.encode(PLAIN), atol=1e-6)


def test_an_adapter_folder_gives_equal_vectors_in_sentence_transformers(tiny_vlm, tmp_path):
    tuned = load(tiny_vlm("llava"))
    before = tuned.encode(PLAIN)
    checkpoint.add_adapter(tuned.backbone, 2, 4, 0.0, None)
    with torch.no_grad():
        for name, weight in tuned.backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    expected = tuned.encode(PLAIN)
    assert (expected * before).sum(axis=1).max() < 0.9999
    tuned.save_pretrained(tmp_path / "adapter")
    assert_equal(expected, open_in_st(tmp_path / "adapter").encode([theirs(value) for value in PLAIN]))


@pytest.fixture(scope="module")
def foreign(tiny_vlm, tmp_path_factory) -> Path:
    """A folder as sentence-transformers itself writes one for a VLM with a chat template."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    source, folder = tiny_vlm("llava"), tmp_path_factory.mktemp("foreign")
    transformer = Transformer(str(source), processor_kwargs={"chat_template": CHAT})
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "lasttoken"), Normalize()]
    SentenceTransformer(modules=modules, prompts={"query": "Find it."}, device="cpu").save_pretrained(str(folder))
    return folder


def test_a_folder_of_sentence_transformers_gives_equal_vectors_here(foreign, tmp_path):
    ours, other = load(foreign), open_in_st(foreign)
    values = PLAIN[:4]
    assert_equal(ours.encode(values), other.encode([theirs(value) for value in values]))
    assert_equal(ours.encode_query(values), other.encode_query([theirs(value) for value in values]))
    ours.save_pretrained(tmp_path / "again")
    assert_equal(load(tmp_path / "again").encode_query(values), ours.encode_query(values))
    again = open_in_st(tmp_path / "again")
    assert_equal(ours.encode(values), again.encode([theirs(value) for value in values]))
    with pytest.raises(Exception, match=r"image_1"):
        again.encode([theirs(PLAIN[4])])


def test_one_folder_gives_equal_vectors_for_every_kind_of_input(tiny_vlm, tmp_path):
    """Both orders of keys, image alone, text alone, two images; query and document prompts; Dense."""
    from sentence_transformers.base.modules.dense import Dense
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    torch.manual_seed(0)
    transformer = Transformer(str(tiny_vlm("llava")), processor_kwargs={"chat_template": CHAT})
    width = transformer.get_embedding_dimension()
    modules = [transformer, Pooling(width, "lasttoken"), Dense(width, 24), Normalize()]
    prompts = {"query": "Find it.", "document": "Represent it."}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(tmp_path))
    ours, other = load(tmp_path), open_in_st(tmp_path)
    values = ["a dog on the beach", {"image": WIDE}, *ORDERS]
    found = {}
    for method in ("encode", "encode_query", "encode_document"):
        found[method] = getattr(ours, method)(values)
        assert found[method].shape == (6, 24)
        assert_equal(found[method], getattr(other, method)([theirs(value) for value in values]))
    for first, second in (("encode", "encode_query"), ("encode_query", "encode_document")):
        assert (found[first] * found[second]).sum(axis=1).min() < 0.9999
    vectors = found["encode"]
    assert vectors[2] @ vectors[3] < 0.9999 and vectors[4] @ vectors[5] < 0.9999


ORDERS = [
    {"text": "what is left of it?", "image": SMALL},
    {"image": SMALL, "text": "what is left of it?"},
    {"text": "which is red?", "images": [WIDE, SMALL]},
    {"images": [WIDE, SMALL], "text": "which is red?"},
]


def test_vectors_follow_the_order_of_keys_as_sentence_transformers_does(foreign, tmp_path):
    ours = load(foreign)
    ours.save_pretrained(tmp_path / "again")
    for here, folder in ((ours, foreign), (load(tmp_path / "again"), tmp_path / "again")):
        there = open_in_st(folder)
        assert_equal(here.encode(ORDERS), there.encode([theirs(value) for value in ORDERS]))
        assert_equal(here.encode_query(ORDERS), there.encode_query([theirs(value) for value in ORDERS]))
    vectors = ours.encode(ORDERS)
    assert vectors[0] @ vectors[1] < 0.999 and vectors[2] @ vectors[3] < 0.999


@pytest.mark.parametrize("like", [None, "royokong/e5-v"])
def test_own_folders_put_images_first_here_and_there(tiny_vlm, tmp_path, like):
    ours = load(tiny_vlm("llava"), like=like)
    ours.save_pretrained(tmp_path / "saved")
    vectors = ours.encode(ORDERS)
    np.testing.assert_allclose(vectors[::2], vectors[1::2], atol=1e-6)
    assert_equal(vectors, open_in_st(tmp_path / "saved").encode([theirs(value) for value in ORDERS]))


def message(*parts: object) -> list[dict[str, object]]:
    kinds = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts
    ]
    return [{"role": "user", "content": kinds}]


def test_text_between_images_is_a_message_there_and_placeholders_here(foreign, tiny_vlm, tmp_path):
    between, split = "<|image_1|>left of<|image_2|>", "a<|image_1|>b<|image_2|>c"
    chats = [message(WIDE, "left of", SMALL), message("a", WIDE, "b", SMALL, "c")]
    values = [{"text": text, "images": [WIDE, SMALL]} for text in (between, split)]
    assert_equal(load(foreign).encode(values), open_in_st(foreign).encode(chats))
    plain = load(tiny_vlm("llava"))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(Exception, match="text between images"):
        open_in_st(tmp_path / "plain").encode(chats[:1])


def test_a_placeholder_says_where_in_a_chat_turn_a_image_stands(foreign):
    prompt, order = load(foreign).backbone.prompt(EmbeddingInput.of(PLAIN[5] | {"instruction": "Do."}))
    assert prompt == "<end><system>Do.<user>first<image>then<image>end<answer>"
    assert order == [0, 1]


def test_compact_needs_the_package_there_and_gives_equal_vectors(tmp_path):
    from vlm2vec.models.st_module import sentence_transformer

    small = {"num_layers": 1, "visual_tokens": 4, "image_size": 64}
    embedder = Embedder.from_pretrained("compact", dtype=torch.float32, device="cpu", **small)
    embedder.save_pretrained(tmp_path / "compact")
    values = [PLAIN[0], PLAIN[1], PLAIN[2]]
    expected = embedder.encode(values)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        open_in_st(tmp_path / "compact")
    flagged = open_in_st(tmp_path / "compact", trust_remote_code=True)
    for model in (flagged, sentence_transformer(tmp_path / "compact", torch.float32)):
        assert_equal(expected, model.encode([theirs(value) for value in values]))
    chat = [{"role": "user", "content": [{"type": "image", "image": WIDE}, {"type": "text", "text": "what?"}]}]
    chat.insert(0, {"role": "system", "content": "Do."})
    by_hand = embedder.encode([{"image": WIDE, "text": "what?", "instruction": "Do."}])
    assert_equal(by_hand, flagged.encode([chat]))
    flagged.save_pretrained(str(tmp_path / "again"))
    assert_equal(expected, load(tmp_path / "again").encode(values))


@pytest.mark.parametrize("family", ["paligemma", "mllama"])
def test_texts_beside_images_are_not_left_to_sentence_transformers(family, tiny_vlm, tmp_path):
    from vlm2vec.models.st_module import sentence_transformer

    embedder = load(tiny_vlm(family))
    embedder.save_pretrained(tmp_path / "saved")
    assert st_folder.OWN_MODULE in (tmp_path / "saved/modules.json").read_text()
    model = sentence_transformer(tmp_path / "saved", torch.float32)
    assert_equal(embedder.encode(PLAIN[:4]), model.encode([theirs(value) for value in PLAIN[:4]]))


def test_padding_on_the_left_is_masked_in_our_module_there(tiny_vlm, tmp_path):
    from vlm2vec.models.st_module import sentence_transformer

    load(tiny_vlm("qwen2_vl"), padding_side="left").save_pretrained(tmp_path / "left")
    texts = ["a dog", "a red car parked on the street", "dogs"]
    model = sentence_transformer(tmp_path / "left", torch.float32)
    assert_equal(load(tiny_vlm("qwen2_vl")).encode(texts), model.encode(texts, batch_size=3))


def test_plain_text_positions_are_not_left_to_sentence_transformers(tiny_vlm, tmp_path):
    vlm2vec = load(tiny_vlm("qwen2_vl"))
    vlm2vec.save_pretrained(tmp_path / "text")
    assert st_folder.OWN_MODULE in (tmp_path / "text/modules.json").read_text()
    vlm2vec.backbone.template = PromptTemplate(image="<|vision_start|>{image}<|vision_end|>")
    vlm2vec.save_pretrained(tmp_path / "multimodal")
    assert st_folder.OWN_MODULE not in (tmp_path / "multimodal/modules.json").read_text()


def test_a_row_that_would_have_text_positions_is_refused_by_the_chat_template(tiny_vlm, tmp_path):
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    qwen = load(tiny_vlm("qwen2_vl"))
    qwen.backbone.template = PromptTemplate(image="<|vision_start|>{image}<|vision_end|>")
    qwen.save_pretrained(tmp_path / "saved")
    chat = (tmp_path / "saved/chat_template.jinja").read_text()

    def render(text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return render_jinja_template([[{"role": "user", "content": content}]], chat_template=chat)[0][0]

    started = "<|vision_start|><|image_1|><|vision_end|>what?"
    assert render(started) == render("what?\n".strip()).removesuffix("\n") == started.replace("image_1", "image_pad")
    with pytest.raises(TemplateError, match="has text positions"):
        render("<|image_1|>\nwhat?")


@pytest.mark.parametrize(
    "template",
    [
        PromptTemplate(),
        PromptTemplate(
            image='"{image}"\\ü😀', instruction="Instruct: {instruction}\nQuery:", separator="", suffix="{}"
        ),
    ],
)
def test_the_chat_template_gives_the_prompt_bytes_of_ours(tiny_vlm, template):
    from transformers.utils.chat_template_utils import render_jinja_template

    backbone = Generic.load(str(tiny_vlm("llava")), torch.float32)
    backbone.template = template
    chat = st_folder.chat_template(template, backbone.image_token)
    for value in PLAIN:
        for instruction in (None, "Find 'it' — now."):
            item = EmbeddingInput.of(value, instruction)
            content = [{"type": "image"}] * len(item.images) + (
                [{"type": "text", "text": item.text}] if item.text else []
            )
            messages = [{"role": "system", "content": instruction}] if instruction else []
            rendered, _ = render_jinja_template([[*messages, {"role": "user", "content": content}]], chat_template=chat)
            assert rendered[0] == backbone.prompt(item)[0]


def test_transformers_alone_reads_weights_and_processor_of_the_folder(saved):
    embedder, folder = saved
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is type(embedder.backbone.model)
    assert transformers.AutoProcessor.from_pretrained(folder).image_token == embedder.backbone.image_token
