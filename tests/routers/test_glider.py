"""GLIDER: words about experts and prompts, one global vector a prompt, and a local router's scores."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from guided import DESCRIPTIONS, NAMES, embed, library_with_gates
from holding import holding
from models import random_factors, types_unchecked, write_adapter
from spectr import Arrow, Calibrated, ExpertLibrary, Glider, Lag, Phatgoose, Spectr, compose, get_router, trace
from spectr.cli import describe as describing
from spectr.cli.app import app
from spectr.errors import CompositionError, DataError, LibraryError, SpectrWarning
from spectr.evaluation import routed_logprobs
from spectr.evaluation.expert_recall import find_experts
from spectr.guidance import QueryGuide, describe
from spectr.library.description_file import DESCRIPTIONS_FILE, read_descriptions, write_descriptions
from spectr.models.generate import encode_batch, generate_answers
from spectr.models.writer import EndpointWriter, LocalWriter
from spectr.routers import AddToScores, PromptPolicy, ScoreMeans
from spectr.tasks import Example
from text_model import make_model, make_tokenizer, save_experts, save_model, save_rows


class Echo:
    """A writer that says what it was shown, and counts."""

    written = 0

    def __init__(self):
        self.seen = []

    def __call__(self, prompts):
        self.seen += prompts
        self.written += 2 * len(prompts)
        return [prompt.partition("Input:\n")[2].partition("\n\n")[0] + " film" for prompt in prompts]


class Fixed:
    """A writer that asks another one always the same."""

    def __init__(self, write, prompt):
        self.write, self.prompt, self.seen = write, prompt, []

    @property
    def written(self):
        return self.write.written

    def __call__(self, prompts):
        self.seen.append(self.write([self.prompt] * len(prompts)))
        return self.seen[-1]


@pytest.fixture
def library(tmp_path):
    return library_with_gates(tmp_path, NAMES).with_descriptions(DESCRIPTIONS)


def guided(model, library, router, **options):
    guide = QueryGuide(make_tokenizer(), embed, **options)
    return compose(model, library, router, guide=guide), guide


def batch(*prompts):
    return encode_batch(make_tokenizer(), prompts)


def cosines(*texts):
    return embed(texts) @ embed([DESCRIPTIONS[name] for name in NAMES]).mT


def test_the_prior_is_alpha_times_the_cosine(library):
    model = make_model()
    routed, _ = guided(model, library, Glider(alpha=7.0))
    found = routed.prompt.decide(**batch("what is the sky", "green grass"))
    torch.testing.assert_close(found, 7 * cosines("what is the sky", "green grass"), rtol=0, atol=1e-5)


def test_the_authors_threshold_is_there_by_name(library):
    assert get_router("glider-paper") == Glider(threshold=0.8)
    routed, _ = guided(make_model(), library, get_router("glider-paper"))
    near, far = "blue sky", "a film is the sky"
    assert cosines(near).max() > 0.8 > cosines(far).max()
    found = routed.prompt.decide(**batch(near, far))
    expected = torch.cat([100 * cosines(near), 3 * cosines(far)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_alpha_is_large_above_what_descriptions_of_two_experts_have_in_common(library):
    """By hand: of each description the largest cosine to another one, and the mean of these."""
    described = {"grass": "green grass film", "sky": "blue sky film", "who": "who film"}
    library = library.with_descriptions(described)
    axes = embed([described[name] for name in NAMES])
    threshold = sum(max(float(axes[t] @ axes[u]) for u in range(3) if u != t) for t in range(3)) / 3
    routed, _ = guided(make_model(), library, Glider())
    near, far = "film who", "what is the"
    cosines = embed([near, far]) @ axes.mT
    assert cosines[0].max() > threshold > cosines[1].max()
    expected = torch.cat([100 * cosines[:1], 3 * cosines[1:]])
    torch.testing.assert_close(routed.prompt.decide(**batch(near, far)), expected, rtol=0, atol=1e-4)
    routed.allow(["sky", "who"])  # the threshold is the library's
    torch.testing.assert_close(routed.prompt.decide(**batch(near, far)), expected[:, 1:], rtol=0, atol=1e-4)
    routed.allow(["sky"])
    assert routed.prompt.decide(**batch(near)).shape == (1, 1)


def test_a_guide_that_compares_no_descriptions_has_the_authors_threshold(library):
    class Words:
        def reader(self, descriptions, experts):
            return lambda input_ids, **_: torch.tensor([[0.81, 0.0, 0.0], [0.79, 0.0, 0.0]])

    with pytest.warns(SpectrWarning, match="has no effect, because Words has no method 'between'"):
        routed = compose(make_model(), library, Glider(), guide=Words())
    decided = routed.prompt.decide(**batch("green grass", "film who"))
    torch.testing.assert_close(decided, torch.tensor([[81.0, 0, 0], [3 * 0.79, 0, 0]]))


def test_a_threshold_that_nobody_knows_is_refused():
    use = AddToScores(threshold="descriptions")
    with pytest.raises(CompositionError, match="compares no descriptions"):
        PromptPolicy(evidence=ScoreMeans(), use=use, router=Calibrated(level="token"))
    with types_unchecked(), pytest.raises(CompositionError, match="a number, or 'descriptions'"):
        Glider(threshold="high")


@pytest.mark.parametrize("local", [Phatgoose(), Spectr(), Arrow()], ids=lambda router: type(router).__name__)
def test_global_and_local_scores_add_up_in_every_layer(library, local):
    model, plain, given = make_model(), make_model(), batch("what is the sky")
    guided(model, library, Glider(token_router=local, alpha=2.0, top_k=3))
    compose(plain, library, type(local)(top_k=3))
    name = "model.layers.1.mlp.down_proj"
    with trace(model) as record:
        model(**given)
    layer, other = model.get_submodule(name), plain.get_submodule(name)
    x_TI = torch.randn(1, 4, 48, generator=torch.Generator().manual_seed(0))
    expected = other.route(x_TI).scores_TE + 2 * cosines("what is the sky")[:, None]
    with holding(layer, prior=2 * cosines("what is the sky")):
        decision = layer.explain(x_TI)
    torch.testing.assert_close(decision.scores_TE, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decision.weights_TE, expected.softmax(-1), rtol=1e-5, atol=1e-5)
    assert record[name].scores.shape[1] == given["input_ids"].shape[1]


def test_a_large_alpha_takes_the_described_expert_for_every_token(library):
    model = make_model()
    guided(model, library, Glider(alpha=1e4, top_k=1))
    with trace(model) as record:
        model(**batch("blue sky"))
    assert record.shares()["sky"] == 1


def test_global_routing_alone_is_held(library):
    model = make_model()
    routed, _ = guided(model, library, Glider(token_router=None, alpha=1.0))
    weights = routed.prompt.decide(**batch("green grass"))
    top = cosines("green grass")[0].topk(2)
    torch.testing.assert_close(weights[0, top.indices], top.values.softmax(-1), rtol=0, atol=1e-5)
    assert (weights > 0).sum() == 2
    call = routed.prompt.routing(weights).of(model.get_submodule("model.layers.0.mlp.up_proj"))
    assert call.factors.A_PI.shape[0] == 8  # the two that were chosen, of rank 4 each
    with trace(model) as record:
        model(**batch("green grass"))
    assert record.shares() == pytest.approx(dict(zip(NAMES, weights[0].tolist(), strict=True)))


def test_a_conversation_is_compared_once(library):
    model, tokenizer, write = make_model(), make_tokenizer(), Echo()
    _, guide = guided(model, library, Glider(alpha=5.0), write=write)
    turns = [{"role": "user", "content": "green grass"}]
    given = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    model(**tokenizer.apply_chat_template(turns, **given))
    turns += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "blue sky"}]
    model(**tokenizer.apply_chat_template(turns, **given))
    assert guide.spent.prompts == 2
    assert guide.spent.cached == 1
    assert guide.spent.tokens == 2
    assert list(guide.instructions) == ["green grass"]
    per_turn = QueryGuide(tokenizer, embed, per="turn")
    read = per_turn.reader(DESCRIPTIONS, NAMES)
    ids = tokenizer.apply_chat_template(turns, **given)
    torch.testing.assert_close(read(**ids), cosines("blue sky"), rtol=0, atol=1e-5)


def test_the_instruction_is_embedded_and_not_the_prompt(library):
    write = Echo()
    routed, guide = guided(make_model(), library, Glider(alpha=1.0), write=write)
    found = routed.prompt.decide(**batch("the sky"))
    torch.testing.assert_close(found, cosines("the sky film"), rtol=0, atol=1e-5)
    assert "the sky" in write.seen[0]
    assert guide.instructions == {"the sky": "the sky film"}


def test_the_composed_model_writes_as_the_base_model(library):
    model, tokenizer = make_model(), make_tokenizer()
    expected = generate_answers(make_model(), tokenizer, ["what is it"], max_new_tokens=6)
    write = LocalWriter(model, tokenizer, max_new_tokens=6)
    _, guide = guided(model, library, Glider(alpha=1.0), write=Fixed(write, "what is it"))
    with trace(model) as record:
        model(**batch("what is the sky"))
    assert guide.write.seen == [expected]
    assert guide.spent.tokens == len(tokenizer(expected[0])["input_ids"])
    assert record.input_ids.shape == batch("what is the sky")["input_ids"].shape  # the writing itself is not traced
    assert record.shares()


def test_generating_goes_on_with_the_decision(library):
    model = make_model()
    _, guide = guided(model, library, Glider())
    model.generate(**batch("blue sky"), max_new_tokens=5, min_new_tokens=5, pad_token_id=2)
    assert guide.spent.prompts == 1


def test_evaluation_decides_on_prompts_alone(library):
    model, tokenizer = make_model(), make_tokenizer()
    routed, guide = guided(model, library, Glider(alpha=3.0))
    prompts = ("the sky", "grass")
    examples = [Example(prompt=text, choices=("green", "blue"), label=0, answer="green") for text in prompts]
    scores, prior_NE = routed_logprobs(model, tokenizer, examples, routed.prompt)
    torch.testing.assert_close(prior_NE, 3 * cosines(*prompts), rtol=0, atol=1e-5)
    assert list(guide.instructions) == list(prompts)
    for prompt, row_E, score_C in zip(prompts, prior_NE, scores, strict=True):
        routed.prompt.hold(row_E[None])
        for word, score in zip(tokenizer("green blue")["input_ids"], score_C, strict=True):
            ids = torch.cat([batch(prompt)["input_ids"], torch.tensor([[word, tokenizer.eos_token_id]])], dim=1)
            logprobs_TV = model(input_ids=ids).logits[0].log_softmax(-1)
            torch.testing.assert_close(score, logprobs_TV[-3, word] + logprobs_TV[-2, tokenizer.eos_token_id])
        routed.prompt.hold(None)
    [finding] = find_experts(model, routed, tokenizer, ["blue sky"], "sky")
    assert 0 <= finding.top_1 <= 1


def test_allowing_and_removing(library):
    model, given = make_model(), batch("blue sky")
    before = model(**given).logits
    routed, _ = guided(model, library, Glider())
    routed.allow(["grass", "sky"])
    assert routed.prompt.decide(**given).shape == (1, 2)
    routed.remove()
    assert torch.equal(model(**given).logits, before)


def test_what_a_guided_router_needs(library, tmp_path):
    with pytest.raises(CompositionError, match="there is no guide"):
        compose(make_model(), library, Glider())
    bare = library.with_descriptions({"sky": "blue"})
    with pytest.raises(CompositionError, match=r"not described: grass, who(.|\n)*spectr library describe"):
        guided(make_model(), bare, Glider())
    for local in (Calibrated(), Lag(), Glider()):
        with pytest.raises(CompositionError, match="expected: a router that scores every expert for each token"):
            Glider(token_router=local)
    with types_unchecked(), pytest.raises(CompositionError, match="alpha='open'"):
        Glider(alpha="open")
    routed, _ = guided(make_model(), library, Glider())
    with pytest.raises(CompositionError, match="needs the prompt's token ids"):
        routed.prompt.decide(inputs_embeds=torch.zeros(1, 2, 32))


def test_descriptions_are_a_file_that_people_edit(tmp_path):
    save_experts(tmp_path, NAMES)
    write_descriptions(tmp_path, {"sky": "blue: or grey", "grass": "green"})
    assert ExpertLibrary.open(tmp_path).descriptions == {"grass": "green", "sky": "blue: or grey"}
    assert ExpertLibrary.open(tmp_path).without("sky").descriptions["sky"] == "blue: or grey"
    path = tmp_path / DESCRIPTIONS_FILE
    path.write_text("sky: a text\n  over two lines\n")
    assert read_descriptions(tmp_path) == {"sky": "a text over two lines"}
    path.write_text("sky: a: b\n")
    with pytest.raises(LibraryError, match=r"is not YAML(.|\n)*quote a text that contains a colon"):
        read_descriptions(tmp_path)
    path.write_text("sky:\ngrass: 3\n")
    with pytest.raises(LibraryError, match="has no text for: sky, grass"):
        read_descriptions(tmp_path)
    path.unlink()
    assert read_descriptions(tmp_path) == {}


class Endpoint(BaseHTTPRequestHandler):
    """A chat endpoint that answers with its last message's length."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if asked.get("model") == "missing":
            self.send_error(404, "no such model")
            return
        message = {"role": "assistant", "content": f" {asked['model']} read {len(asked['messages'][0]['content'])} "}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"completion_tokens": 3, "prompt_tokens": 1, "total_tokens": 4}
        more = {"id": "1", "created": 0, "model": "m", "system_fingerprint": "", "object": "chat.completion"}
        body = json.dumps({"choices": [choice], "usage": usage, **more}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_endpoint_writes(url):
    write = EndpointWriter(url, "small")
    assert write(["abc", "de"]) == ["small read 3", "small read 2"]
    assert write.written == 6
    with pytest.raises(DataError, match=r"did not answer(.|\n)*check the address"):
        EndpointWriter(url, "missing")(["abc"])
    with pytest.raises(DataError, match="did not answer"):
        EndpointWriter("http://127.0.0.1:9/v1", "small")(["abc"])


def test_examples_are_shown_to_whoever_describes():
    write = Echo()
    rows = [Example(prompt=f"is {n} even", choices=(), label=None, answer="yes") for n in (2, 4)]
    assert describe(write, rows) == "is 2 even Output: yes film"
    assert "is 4 even\nOutput: yes" in write.seen[0]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_commands_describe_and_route(tmp_path, url, monkeypatch):
    library_with_gates(tmp_path, NAMES)
    save_model(tmp_path / "model")
    rows = save_rows(tmp_path / "rows.jsonl")
    experts, prompt = tmp_path / "experts", ("--prompt", "what is the {thing}", "--choices", "green,blue")
    given = ("-l", experts, "--data", rows, *prompt)
    assert "one task's data cannot be for 3 experts" in str(run("library", "describe", *given).exception)
    assert run("library", "describe", "sky", *given, "--writer", f"{url}#small").exit_code == 0
    assert run("library", "describe", "grass", *given, "-m", tmp_path / "model").exit_code == 0
    assert run("library", "describe", "who", "-l", experts, "--text", "who is it").exit_code == 0
    found = read_descriptions(experts)
    assert found["sky"].startswith("small read")
    assert found["who"] == "who is it"
    assert "all of these experts have a description" in run("library", "describe", "-l", experts).output
    for words, told in (
        (("--text", "x"), "--text describes exactly one expert"),
        (("sky", "--text", " "), "--text is empty"),
        (("sky", *given[2:], "--writer", "none"), "--writer none writes nothing"),
        (("sky", *given[2:], "--writer", url), "the model's name after the address"),
        (("sky", *given[2:], "--writer", tmp_path / "no"), f"--writer {tmp_path / 'no'}"),
    ):
        assert told in str(run("library", "describe", "-l", experts, *words).exception), words
    monkeypatch.setattr("spectr.models.embed.load_embedder", lambda name=None, **_: embed)
    words = ("generate", "blue sky", "-l", experts, "-m", tmp_path / "model", "--json", "-n", 2)
    shown = run(*words, "-r", "glider", "--writer", "none")
    assert shown.exit_code == 0, shown.exception
    assert "comparing descriptions: 1 new of 1 prompts, 0 tokens written" in shown.stderr
    assert describing.open_writer(f"{url}#small", "auto").model == "small"
    (experts / DESCRIPTIONS_FILE).unlink()
    assert "not described: grass, sky, who" in str(run(*words, "-r", "glider").exception)
    assert "have no effect" in run(*words, "-r", "spectr", "--writer", "none").stderr


def test_the_packaged_embedder_tells_sentences_apart():
    from spectr.models.embed import load_embedder

    vectors = load_embedder()(["a movie review", "a review of a film", "two questions"])
    assert vectors.shape == (3, 384)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > vectors[0] @ vectors[2]


def test_an_embedder_that_is_not_there(tmp_path):
    from spectr.models.embed import load_embedder

    with pytest.raises(DataError, match=r"the sentence embedder .* cannot be loaded"):
        load_embedder(str(tmp_path / "nothing"))


def test_a_model_with_an_encoder_is_guided_by_what_its_encoder_reads(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
        model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=2, decoder_start_token_id=2)).eval()
    factors = {"encoder.block.0.layer.0.SelfAttention.q": 1, "decoder.block.0.layer.0.SelfAttention.q": 2}
    for seed, name in enumerate(NAMES):
        write_adapter(tmp_path / name, {at: random_factors(2, 16, 16, 10 * seed + n) for at, n in factors.items()})
    library = ExpertLibrary.open(tmp_path).with_descriptions(DESCRIPTIONS)
    routed, guide = guided(model, library, Glider(token_router=Spectr(), alpha=1e4, top_k=1))
    with trace(model) as record:
        model.generate(input_ids=torch.tensor([make_tokenizer()("green grass")["input_ids"]]), max_new_tokens=3)
    assert (guide.spent.prompts, record.shares()["grass"]) == (1, 1)
    assert routed.prompt.weights_BE.shape == (1, 3)
