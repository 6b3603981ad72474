"""Which row each image belongs to: batches of several images a row, whose rows have experts of their own."""

from __future__ import annotations

import pytest
import torch

from beyond_lora import moved_adapter
from models import SIZES, TEXT, TOKENS, build, close, peft_model
from spectr import ExpertLibrary, Spectr, compose, trace
from spectr.errors import CompositionError
from trained_modules import ROWS

IMAGE, GRID = 55, 4  # the token that stands for images; tokens for each in all three models
LLAMA = {**TEXT, **TOKENS, "num_key_value_heads": 2, "model_type": "llama"}
VISION = {**SIZES, "image_size": 8, "patch_size": 4}
BATCHES = [(1, 1), (3, 1), (2, 0), (1, 2), (2, 1, 1)]  # images of each row


def llava():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}
    named = {"image_token_index": IMAGE, "image_token_id": IMAGE}
    config = LlavaConfig(vision_config=vision, text_config=LLAMA, vision_feature_layer=-1, **named)
    return build(LlavaForConditionalGeneration, config)


def idefics3():
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    vision = {**VISION, "image_size": 16}
    config = Idefics3Config(text_config=LLAMA, vision_config=vision, image_token_id=IMAGE, scale_factor=2)
    return build(Idefics3ForConditionalGeneration, config)


def qwen2_vl():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {**LLAMA, "model_type": "qwen2_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    ids = {"video_token_id": 56, "vision_start_token_id": 53, "vision_end_token_id": 54}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, **ids)
    return build(Qwen2VLForConditionalGeneration, config)


def text_of(images):
    """A row of tokens for each number of images."""
    ids = torch.randint(3, 50, (len(images), 2 + 5 * max(images)), generator=torch.Generator().manual_seed(5))
    for row, count in enumerate(images):
        for image in range(count):
            ids[row, 2 + 5 * image : 6 + 5 * image] = IMAGE
    return ids


def given(name, images):
    """What a batch is given, and what each of its rows is given alone."""
    ids, generator = text_of(images), torch.Generator().manual_seed(1)
    if name == "idefics3":
        pixels = torch.zeros(len(images), max(images), 3, 16, 16)
        for row, count in enumerate(images):
            pixels[row, :count] = torch.randn(count, 3, 16, 16, generator=generator)
        return {"input_ids": ids, "pixel_values": pixels}, [
            {"input_ids": ids[row : row + 1], "pixel_values": pixels[row : row + 1]} for row in range(len(images))
        ]
    patches = 16 if name == "qwen2_vl" else 1
    shape = (16, 96) if name == "qwen2_vl" else (1, 3, 8, 8)
    pictures = [torch.randn(shape, generator=generator) for _ in range(sum(images))]

    def call(ids, pictures):
        found = {"input_ids": ids, **({"pixel_values": torch.cat(pictures)} if pictures else {})}
        if patches > 1:
            found["mm_token_type_ids"] = (ids == IMAGE).int()
            found |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * len(pictures))} if pictures else {}
        return found

    ends = torch.tensor((0, *images)).cumsum(0).tolist()
    alone = [call(ids[r : r + 1], pictures[ends[r] : ends[r + 1]]) for r in range(len(images))]
    return call(ids, pictures), alone


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A composed model, and PEFT's with each expert."""
    kept = {}

    def make(name):
        if name not in kept:
            model, root = (
                {"llava": llava, "idefics3": idefics3, "qwen2_vl": qwen2_vl}[name](),
                tmp_path_factory.mktemp(name),
            )
            targets = r".*(q_proj|v_proj|fc1|linear_1|qkv|modality_projection.proj)"
            folders = [
                moved_adapter(model, root / each, seed, target_modules=targets) for seed, each in enumerate("ab")
            ]
            theirs = [peft_model(model, folder) for folder in folders]
            routed = compose(model, ExpertLibrary.from_adapters(dict(zip("ab", folders, strict=True))), ROWS)
            kept[name] = model, routed, theirs
        return kept[name]

    return make


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
@torch.no_grad()
def test_images_have_the_expert_of_their_row(name, made):
    model, routed, theirs = made(name)
    for images in BATCHES if name != "idefics3" else [each for each in BATCHES if min(each)]:
        batch, alone = given(name, images)
        with routed.prompt.using(torch.eye(2)[[row % 2 for row in range(len(images))]]):
            ours = model(**batch).logits
        for row, one in enumerate(alone):
            close(ours[row], theirs[row % 2](**one).logits[0], 1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@torch.no_grad()
def test_images_of_a_generation_have_the_expert_of_their_row(name, made):
    """Transformers encodes them ahead of the model's calls."""
    model, routed, theirs = made(name)
    free = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for images in BATCHES:
        batch, alone = given(name, images)
        for beams in (1, 2):
            with routed.prompt.using(torch.eye(2)[[row % 2 for row in range(len(images))]]):
                said = model.generate(**batch, num_beams=beams, **free)
            for row, one in enumerate(alone):
                assert torch.equal(said[row], theirs[row % 2].generate(**one, num_beams=beams, **free)[0])
    batch, alone = given(name, (1, 1))
    one = alone[1]
    expert = int(one["input_ids"][0, 0]) % 2  # as ROWS decides
    assert torch.equal(model.generate(**one, **free), theirs[expert].generate(**one, **free))


@torch.no_grad()
def test_without_token_ids_only_what_is_seen_to_fit_is_computed(made):
    model, routed, theirs = made("llava")
    for images in ((1, 1), (2, 0)):
        batch, alone = given("llava", images)
        embeds = model.get_input_embeddings()(batch["input_ids"])
        with routed.prompt.using(torch.eye(2)):
            if images == (1, 1):
                ours = model(inputs_embeds=embeds, pixel_values=batch["pixel_values"]).logits
                close(ours[1], theirs[1](**alone[1]).logits[0], 1e-4)
                continue
            with pytest.raises(CompositionError, match="not known which row each image"):
                model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])


@torch.no_grad()
def test_a_trace_of_tokens_decisions_needs_no_rows_of_images(made):
    compose(base := llava(), made("llava")[1].library, Spectr(top_k=1))
    batch, _ = given("llava", (2, 0))
    embeds = base.get_input_embeddings()(batch["input_ids"])
    ours = base(inputs_embeds=embeds, pixel_values=batch["pixel_values"]).logits
    with trace(base):
        close(base(inputs_embeds=embeds, pixel_values=batch["pixel_values"]).logits, ours)


def blip():
    """Its forward needs images, so that where tokens are cannot be learned from a text alone."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {**TEXT, **TOKENS, "encoder_hidden_size": 32, "initializer_range": 0.25}
    vision = {**VISION, "initializer_range": 0.25}
    return build(BlipForConditionalGeneration, BlipConfig(text_config=text, vision_config=vision)), {}


def mistral3():
    """It merges the patches of each image by itself, with ``unfold``."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {**VISION, "image_size": 16, "model_type": "pixtral", "head_dim": 8}
    text = {**LLAMA, "model_type": "mistral", "head_dim": 8}
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2)
    return build(Mistral3ForConditionalGeneration, config), {"image_sizes": torch.tensor([[16, 16], [16, 16]])}


@pytest.mark.parametrize(("made", "targets"), [(blip, ["query", "value", "qkv"]), (mistral3, "all-linear")])
def test_each_row_has_one_image_and_an_expert(made, targets, tmp_path):
    model, more = made()
    side = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": text_of((1, 1)), "pixel_values": pixels, **more}
    folders = {name: moved_adapter(model, tmp_path / name, i, target_modules=targets) for i, name in enumerate("ab")}
    rows_agree(model, folders, inputs)


def rows_agree(model, folders, inputs):
    """Of a batch of two rows, one with each expert, what PEFT's model with that expert computes for the row alone."""
    with torch.no_grad():
        alone = [
            peft_model(model, folder)(**{k: v[[row]] for k, v in inputs.items()}).logits
            for row, folder in enumerate(folders.values())
        ]
        routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
        with routed.prompt.using(torch.eye(2)):
            close(model(**inputs).logits, torch.cat(alone), 1e-4)


def test_convolutions_of_sounds_that_halve_their_channels(tmp_path):
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    sizes = {"d_model": 32, "vocab_size": 61, "max_source_positions": 20, "init_std": 0.25, **TOKENS}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    config = Speech2TextConfig(**sizes, decoder_start_token_id=1, input_feat_per_channel=8, conv_channels=16)
    model = build(Speech2TextForConditionalGeneration, config)
    folders = {name: moved_adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    sounds = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    rows_agree(model, folders, {"input_features": sounds, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])})


def test_rows_of_sounds_have_experts_of_their_own(tmp_path):
    """Whisper's encoder reads no text: its layers' rows cannot be learned from a text alone."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 32, "vocab_size": 61, "num_mel_bins": 8, "max_source_positions": 10, "init_std": 0.25, **TOKENS}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    model = build(WhisperForConditionalGeneration, WhisperConfig(**sizes, decoder_start_token_id=1))
    folders = {name: moved_adapter(model, tmp_path / name, seed) for seed, name in enumerate("ab")}
    sounds = torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))
    inputs = {"input_features": sounds, "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    alone = [
        peft_model(model, folder)(**{k: v[[row]] for k, v in inputs.items()})
        for row, folder in enumerate(folders.values())
    ]
    routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
    with torch.no_grad(), routed.prompt.using(torch.eye(2)):
        close(model(**inputs).logits, torch.cat([out.logits for out in alone]))
        with trace(model) as record:
            model(**inputs)
    assert record["model.decoder.layers.0.self_attn.q_proj"].experts == ("a", "b")


@torch.no_grad()
def test_a_cache_with_an_image_is_not_read_again_nor_taken_for_another_image(tmp_path):
    model = llava()
    folders = {
        name: moved_adapter(model, tmp_path / name, seed, target_modules=r".*language_model.*[qv]_proj")
        for seed, name in enumerate("ab")
    }
    theirs = [peft_model(model, folder) for folder in folders.values()]
    routed = compose(model, ExpertLibrary.from_adapters(folders), ROWS)
    batch, _ = given("llava", (1,))
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    free = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first, second = torch.eye(2)[:1], torch.eye(2)[1:]
    with routed.prompt.using(first):
        cache = model(**batch, use_cache=True).past_key_values
    length = cache.get_seq_length()
    with routed.prompt.using(second), pytest.raises(CompositionError, match="more than token ids"):
        model(torch.tensor([[7]]), past_key_values=cache)
    assert cache.get_seq_length() == length
    with routed.prompt.using(first):
        more = torch.cat([batch["input_ids"], torch.tensor([[7, 9]])], 1)
        for asked in (other, batch):
            got = model.generate(**{**asked, "input_ids": more}, past_key_values=cache, **free)
            assert torch.equal(got, theirs[0].generate(**{**asked, "input_ids": more}, **free))


@torch.no_grad()
@pytest.mark.parametrize("alike", [True, False])
def test_positions_of_several_axes_are_read_again_where_these_are_alike(made, alike):
    model, routed, theirs = made("qwen2_vl")
    ids = text_of((0,)).repeat(1, 3)
    places = torch.arange(3, 9).expand(3, 1, 6).clone()
    if not alike:
        places[1, :, 4:] += 1
    with routed.prompt.using(torch.eye(2)[:1]):
        cache = model(ids[:, :5], position_ids=places[..., :5], use_cache=True).past_key_values
    with routed.prompt.using(torch.eye(2)[1:]):
        step = {"input_ids": ids[:, 5:], "position_ids": places[..., 5:], "past_key_values": cache}
        if alike:
            close(model(**step).logits[:, -1], theirs[1](ids, position_ids=places).logits[:, -1], 1e-4)
            return
        with pytest.raises(CompositionError, match="more than token ids"):
            model(**step)
