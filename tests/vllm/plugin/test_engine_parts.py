"""The parts of the vLLM plugin that need no vLLM: requests, masks, weights, shards."""

from importlib import import_module

import numpy as np
import pytest
import torch

import spectr
from adapters_on_disk import assert_says
from beyond_lora import moved_adapter
from composed_parts import MODULES, session_of, several
from models import random_factors, tiny_llama
from spectr.errors import CompositionError
from spectr.layers import RoutedLinear
from spectr.selection import select_among
from spectr.spectral import AlignedExpert, SideData, Stack
from spectr.vllm import EXPERTS, ROUTE_ID, ROUTING
from spectr.vllm.layer import Experts, _kept
from spectr.vllm.layer_routing import Group, ScoreTransform, needs_transforms
from spectr.vllm.probes import Row
from spectr.vllm.register import _supported, check_version, register
from spectr.vllm.requests import PROBE, ROUTER, SKIPPED, VERDICT, RequestOptions
from spectr.vllm.router_set import routers_of, supported
from spectr.vllm.tensor_parallel import Split

KNOWN = ("amber", "blue", "cyan")


@pytest.mark.parametrize(
    ("given", "open_", "closed"),
    [
        (None, KNOWN, ()),
        ({}, KNOWN, ()),
        ({"other": 1}, KNOWN, ()),
        ({EXPERTS: ["blue", "amber", "blue"]}, ("amber", "blue"), ("amber", "blue")),
        ({EXPERTS: "blue, amber"}, ("amber", "blue"), ("amber", "blue")),
        ({EXPERTS: []}, (), ()),
        ({EXPERTS: ["amber", "dun"]}, (), ()),
        ({EXPERTS: ["amber", 3]}, (), ()),
        ({EXPERTS: {"amber": 1}}, (), ()),
        ({EXPERTS: 7}, (), ()),
        ("nonsense", KNOWN, ()),
    ],
)
def test_a_request_gets_the_experts_that_it_names_or_none(given, open_, closed):
    asked = RequestOptions.of(given)
    assert asked.allowed(KNOWN, "open") == frozenset(open_)
    assert asked.allowed(KNOWN, "closed") == frozenset(closed)


@pytest.mark.parametrize(
    ("routing", "route_id", "kept"),
    [
        ("tokens", "x", True),
        ("layers", "x", True),
        ("all", "x", False),
        ("tokens", 3, False),
        ("tokens", "x" * 201, 0),
    ],
)
def test_reports_are_for_who_asks_in_the_right_words(routing, route_id, kept):
    asked = RequestOptions.of({ROUTING: routing, ROUTE_ID: route_id})
    assert (asked.routing, asked.route_id) == ((routing, route_id) if kept else ("", ""))


def test_salts_are_equal_for_equal_sets_alone():
    def salt(names, removed=()):
        return RequestOptions.of({} if names is None else {EXPERTS: names}).salt(removed)

    assert salt(None) == ""
    assert salt(["amber", "blue"]) == salt("blue,amber,amber")
    different = [salt(None), salt([]), salt(["amber"]), salt(["amber", "blue"]), salt(7), salt(None, {"blue"})]
    different += [
        RequestOptions.of({**told, ROUTER: "calibrated"}).salt() for told in ({}, {EXPERTS: ["amber", "blue"]})
    ]
    assert len(set(different)) == len(different)
    assert RequestOptions.of({EXPERTS: ["amber"], ROUTER: "arrow"}).salt() == salt(
        ["amber"]
    )  # there is nothing to choose
    assert RequestOptions.of({EXPERTS: ["amber"], ROUTING: "tokens", ROUTE_ID: "x"}).salt() == salt(["amber"])
    assert salt(["amber", "blue"], {"blue"}) == salt(["amber"])  # what is left is that set, and computes the same
    assert salt(["amber"], {"blue"}) == salt(["amber"])


@pytest.mark.parametrize("name", ["spectr", "calibrated-token", "arrow", "uniform", "seqr", "phatgoose"])
def test_a_token_that_may_use_one_expert_gives_it_all_weight_whoever_routes(name):
    select = supported(spectr.get_router(name)).selection
    scores_TE = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)) * 30
    assert torch.equal(select_among(select, scores_TE, torch.eye(5).bool()), torch.eye(5))


def plain_side(name):
    return SideData(torch.zeros(12), 1.0, torch.ones(12))


def stack_of(router, ranks, seed, inputs=12, outputs=10, side=plain_side):
    parts = {}
    for number, (name, rank) in enumerate(ranks.items()):
        A, B = random_factors(rank, inputs, outputs, 10 * seed + number)
        parts[name] = router.init_expert(AlignedExpert.of(A, B, 2.0), side(name))
    return Stack.of(parts)


ROUTERS = [
    spectr.Spectr(top_k=2),
    spectr.Spectr(top_k=2, score="projection", weights="softmax"),
    spectr.Spectr(top_k=2, combine="factors"),
    spectr.Arrow(top_k=2),
    spectr.Uniform(),
]


@pytest.mark.parametrize("router", ROUTERS, ids=str)
@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 4, 3)], ids=str)
def test_packed_modules_are_the_routed_layers_of_each(router, ranks):
    if len(set(ranks)) > 1 and router != ROUTERS[0]:
        ranks = (3, 3, 3)
    many = 2 if len(set(ranks)) == 1 else 1
    named = dict(zip(KNOWN, ranks, strict=True))
    stacks = [stack_of(router, named, seed) for seed in range(many)]
    x_TI = torch.randn(6, 12, generator=torch.Generator().manual_seed(9))
    ways = [[ScoreTransform.of(stack, stack, router)] for stack in stacks if needs_transforms([router])]
    group, router_T = Group(stacks, [router], [0, 1, 2], 3, transforms=ways), torch.zeros(6, dtype=torch.int32)
    h_TSP = torch.stack([x_TI @ stack.A_PI.mT for stack in stacks], dim=1)
    routing_TF = torch.ones(6, 3)
    scores_TSE, weights_TSE = group.choose(h_TSP, x_TI, routing_TF, router_T)
    weighted_TSP = group.weighted(h_TSP, weights_TSE)
    for number, stack in enumerate(stacks):
        base = torch.nn.Linear(12, 10, bias=False)
        layer = RoutedLinear(base, stack, router)
        torch.testing.assert_close(scores_TSE[:, number], layer.scores(x_TI))
        update_TO = (layer(x_TI) - base(x_TI)).detach()
        torch.testing.assert_close(weighted_TSP[:, number] @ stack.B_OP.mT, update_TO, rtol=1e-4, atol=1e-5)


def test_scores_are_informed_where_a_prior_is_and_weights_held_are_no_choice():
    router = spectr.Calibrated(level="prior", top_k=1)
    group = Group([stack_of(router, dict.fromkeys(KNOWN, 2), 0)], [router], [2, 0, 1], 3, most_fixed=2)
    h_TSP = torch.tensor([1.0, 0, 2, 0, 3, 0]).expand(3, 1, 6)
    routing_TF = torch.tensor([[1, torch.nan, 2.5], [-0.7, torch.nan, torch.nan], [-0.2, -0.5, torch.nan]])
    x_TI = torch.ones(3, 12)
    scores_TSE, weights_TSE = group.choose(h_TSP, x_TI, routing_TF, torch.zeros(len(x_TI), dtype=torch.int32))
    assert scores_TSE[:, 0].tolist() == [[2.5, 2, 3], [1, 2, 3], [1, 2, 3]]
    torch.testing.assert_close(weights_TSE[:, 0], torch.tensor([[1, 0, 0], [0, 0.7, 0], [0, 0.2, 0.5]]))


KIN = [
    spectr.Spectr(top_k=2),
    spectr.Calibrated(level="token", top_k=1),
    spectr.Arrow(top_k=3),
    spectr.Uniform(),
    spectr.Spectr(top_k=1, score="projection"),
    spectr.Seqr(top_k=2, weights="softmax"),
]


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("first", range(len(KIN)))
def test_by_the_factors_of_one_router_each_of_its_kin_scores_and_chooses_as_by_its_own(first, ranks):
    routers = KIN[first:] + KIN[:first]
    named, x_TI = dict(zip(KNOWN, ranks, strict=True)), torch.randn(60, 12, generator=torch.Generator().manual_seed(9))

    def stacks(router, removed=()):
        found = []
        for seed in range(2):
            mean = torch.randn(12, generator=torch.Generator().manual_seed(seed))
            parts = stack_of(router, named, seed, side=lambda name, m=mean: SideData(m, 2.0 + len(name))).parts()
            found.append(Stack.of({n: _kept(part, n in removed) for n, part in parts.items()}))
        return found

    def ways(removed=()):
        held = stacks(routers[0], removed)
        return [
            [ScoreTransform.of(stacks(router, removed)[s], held[s], router) for router in routers]
            for s in range(len(held))
        ]

    held, router_T = stacks(routers[0]), torch.arange(60, dtype=torch.int32) % len(routers)
    group = Group(held, routers, [0, 1, 2], 3, transforms=ways())
    h_TSP = torch.stack([x_TI @ stack.A_PI.mT for stack in held], dim=1)
    scores_TSE, weights_TSE = group.choose(h_TSP, x_TI, torch.ones(60, 3), router_T)
    for number, router in enumerate(routers):
        for s, own in enumerate(stacks(router)):
            layer, mine = RoutedLinear(torch.nn.Linear(12, 10), own, router), router_T == number
            torch.testing.assert_close(scores_TSE[mine, s], layer.scores(x_TI[mine]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights_TSE[mine, s], layer.route(x_TI[mine]).weights_TE, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.B_OP @ own.A_PI, held[s].B_OP @ held[s].A_PI, rtol=1e-4, atol=1e-5)
    group.refill(stacks(routers[0], ["blue"]), ways(["blue"]))
    blue = group.member_EP[1] > 0
    assert not group.scales_SWP[..., blue].any()
    assert set(group.centers_SWP[..., blue].unique().tolist()) == {0, 1}  # one is what all are scored by Uniform


def test_an_expert_without_weight_does_nothing_whatever_its_numbers():
    router = spectr.Spectr(top_k=1)
    group = Group([stack_of(router, dict.fromkeys(KNOWN, 2), 0)], [router], [0, 1, 2], 3)
    h_TSP = torch.ones(1, 1, 6)
    h_TSP[..., 2:4] = torch.inf
    x_TI, routing_TF = torch.ones(1, 12), torch.tensor([[1.0, torch.nan, 1.0]])
    scores_TSE, weights_TSE = group.choose(h_TSP, x_TI, routing_TF, torch.zeros(len(x_TI), dtype=torch.int32))
    assert scores_TSE[0, 0, 1] == torch.inf
    assert weights_TSE[0, 0, 1] == 0
    assert group.weighted(h_TSP, weights_TSE).isfinite().all()


def test_a_probe_is_the_base_models_whoever_it_decides_among():
    told = {EXPERTS: ["blue", "amber"], PROBE: "one", SKIPPED: 3}
    asked = RequestOptions.of(told)
    assert (asked.among, asked.probe, asked.skipped) == (("amber", "blue"), "one", 3)
    assert asked.allowed(["amber", "blue"], "open") == frozenset()
    assert asked.salt() == RequestOptions(experts=()).salt() != RequestOptions.of({EXPERTS: ["blue", "amber"]}).salt()
    for wrong in ({PROBE: 7}, {PROBE: "x" * 300}, {SKIPPED: -1}, {SKIPPED: "3"}):
        assert not RequestOptions.of({**told, **wrong}).understood


def split(by_input, rank, parts, whole, index):
    return Split(rank=rank, ranks=2, by_input=by_input, parts=parts, whole=whole, index=index)


def test_shards_of_a_column_parallel_layer_are_its_rows():
    B_OP = torch.arange(24.0).view(12, 2)  # q of 8 rows in two shards; k of 4 that both ranks hold
    second = split(False, 1, (4, 4), (8, 4), (1, 0))
    assert torch.equal(second.outputs(B_OP[:8], 0, 2), B_OP[4:8])
    assert torch.equal(second.outputs(B_OP[8:], 1, 2), B_OP[8:])
    assert torch.equal(second.outputs(B_OP, 0, 1), torch.cat([B_OP[4:8], B_OP[8:]]))  # packed on disk
    assert second.places(2) == [(0, 4), (4, 4)]
    assert second.places(1) == [(0, 8)]
    assert torch.equal(second.inputs(B_OP.mT), B_OP.mT)


def test_shards_of_a_row_parallel_layer_are_columns_and_their_sum_is_the_whole():
    A_PI, B_OP = random_factors(3, 8, 5, 1)
    x_TI = torch.randn(4, 8)
    ranks = [split(True, rank, (5,), (5,), (0,)) for rank in range(2)]
    h_TP = sum(x_TI[:, 4 * r : 4 * r + 4] @ ranks[r].inputs(A_PI).mT for r in range(2))
    out_TO = sum(h_TP[:, one.columns(3)] @ one.outputs(B_OP, 0, 1).mT for one in ranks)
    torch.testing.assert_close(out_TO, x_TI @ A_PI.mT @ B_OP.mT)


def test_parts_that_are_not_the_modules_are_refused():
    with pytest.raises(CompositionError) as error:
        split(False, 0, (4, 4, 4), (8, 8, 8), (0, 0, 0)).check("model.mixer", ["a", "b"])
    assert_says(error.value, given=("model.mixer packs a, b in 3 parts",), expected="one part", do="transformers")


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False), ("0.33.0", False), (None, False)]
)
def test_the_supported_range(version, fits):
    assert _supported(version) is fits


def test_another_version_registers_nothing_and_reports_it(monkeypatch):
    monkeypatch.setattr(import_module("spectr.vllm.register"), "engine_version", lambda: "0.33.1")
    with pytest.raises(CompositionError) as error:
        check_version()
    assert_says(error.value, given=("vLLM 0.33.1",), expected="0.32.0 and later, below 0.33", do="install")
    with pytest.warns(UserWarning, match="composed models will not load: vLLM 0.33.1"):
        register()  # does not import the engine, or this would fail


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def asked_by(verdict, router="calibrated"):
    return RequestOptions.of({VERDICT: verdict, ROUTER: router})


def test_masks_hold_what_was_found_of_a_prompt_and_salts_tell_it_apart(tmp_path):
    nan, found = torch.nan, {"amber": 0.75, "blue": 0.25}
    held = session_of(tmp_path, KNOWN)
    held.routers = routers_of(several("spectr", {"name": "calibrated", "top_k": 2}))
    told = [
        asked_by(found),
        asked_by({**found, "cyan": 0}),
        asked_by({**found, "cyan": 0.1}),
        asked_by(found, "calibrated-prior"),
    ]
    none = [nan, nan, nan]
    rows = [held.row(one).tolist() for one in told]
    assert_same(torch.tensor(rows), torch.tensor([[-0.75, -0.25, nan], [-0.75, -0.25, nan], none, none]))
    informed = session_of(tmp_path / "informed", KNOWN)
    informed.routers = routers_of(several("calibrated-prior"))
    assert_same(torch.from_numpy(informed.row(told[3])), torch.tensor([0.75, 0.25, nan]))
    assert np.isnan(informed.row(told[0])).all()
    held.remove("blue")
    assert_same(torch.from_numpy(held.row(told[0])), torch.tensor([-0.75, nan, nan]))
    wrong = ({"amber": -1}, {"amber": "1"}, {"amber": nan}, {"umber": 1.0}, ["amber"], 3)
    assert all(np.isnan(held.row(asked)).all() for asked in (*map(asked_by, wrong), asked_by(found, "spectr")))
    salts = [asked.salt() for asked in (*told, asked_by(found | {"blue": 0.2}), asked_by({"amber": 0.75}))]
    salts += [
        RequestOptions.of({EXPERTS: ["amber", "blue"], ROUTER: name}).salt() for name in ("", "spectr", "calibrated")
    ]
    assert len(set(salts)) == len(salts)
    assert told[0].salt({"blue"}) == asked_by({"amber": 0.75}).salt()


def test_masks_of_a_step(tmp_path):
    session = session_of(tmp_path, KNOWN)
    asked = [*(RequestOptions.of({EXPERTS: names}) for names in (["amber"], ["nobody"], "cyan,blue")), RequestOptions()]
    step = [Row(str(number), one, 0, 1 + (number == 0), 9) for number, one in enumerate(asked)]
    session.write(step, ["0", "1", "2", "3"])
    nan = torch.nan
    expected = torch.tensor([[1, nan, nan], [1, nan, nan], [nan, nan, nan], [nan, 1, 1], [1, 1, 1]])
    assert_same(session.routing_TE[:5], expected)
    session.remove("blue")
    session.write(step, ["0", "1", "2", "3"])
    expected[:, 1] = nan
    assert_same(session.routing_TE[:5], expected)
    assert session.status()["experts"] == ["amber", "cyan"]
    session.routers = routers_of(several("spectr", "calibrated", "arrow"))
    undecided = [RequestOptions.of({EXPERTS: names, ROUTER: "calibrated"}) for names in (["amber", "cyan"], ["cyan"])]
    odd = RequestOptions.of({EXPERTS: ["amber", "cyan"], ROUTER: "layer"})
    session.write([Row(str(n), one, 0, 1, 9) for n, one in enumerate((*undecided, odd))], ["0", "1", "2"])
    assert_same(session.routing_TE[:3], torch.tensor([[nan, nan, nan], [nan, nan, 1], [nan, nan, nan]]))
    both = [RequestOptions.of({EXPERTS: ["amber", "cyan"], ROUTER: name}) for name in ("arrow", "spectr", "")]
    session.write([Row(str(n), one, 0, 2, 9) for n, one in enumerate(both)], ["0", "1", "2"])
    assert session.router_T[:6].tolist() == [1, 1, 0, 0, 0, 0]
    with pytest.raises(CompositionError) as error:
        session.remove("umber")
    assert_says(error.value, given=("unknown expert 'umber'",), expected=None, do="did you mean 'amber'")


def test_a_model_without_the_experts_layers_is_refused(tmp_path):
    session = session_of(tmp_path, KNOWN)
    with pytest.raises(CompositionError) as error:
        session.check()
    assert_says(error.value, given=("no layer is routed",), expected="all layers", do="the base model")
    session.routed["model.layers.0.mlp.up_proj"] = "model.layers.0.mlp.gate_up_proj"
    with pytest.raises(CompositionError) as error:
        session.check()
    assert_says(error.value, given=("1 of 2 modules are routed",), expected="all layers", do="the base model")


def layer_of(session):
    layer = Experts(MODULES, split(False, 0, (8, 8), (8, 8), (0, 0)), session, lambda tensor: tensor)
    layer.device, layer.dtype, layer.routed_modules = torch.device("cpu"), torch.float32, list(MODULES)
    stacks = layer._stacks(session, session.router)
    layer.runs, layer.groups = layer._grouped(session, stacks, session.routers.token_routers)
    return layer


def test_what_is_kept_is_read_for_any_requests_of_a_step(tmp_path):
    session = session_of(tmp_path, KNOWN)
    layer = layer_of(session)
    layer._keep(session)
    layer.weights_0.copy_(torch.arange(layer.weights_0.numel()).view_as(layer.weights_0))
    for requests in ([], [2], [0, 3]):  # none where all prompts of a step go on in the next
        kept = layer.recorded("weights", requests)
        assert [rows.tolist() for rows in kept] == layer.weights_0[requests].movedim(1, 0).tolist()


@pytest.mark.parametrize("names", [("spectr", "calibrated"), ("spectr", "calibrated-prior", "calibrated")])
def test_probes_are_scored_by_factors_of_one_of_the_engines_routers(tmp_path, names, monkeypatch):
    session, prepared = session_of(tmp_path, KNOWN), []
    layer = layer_of(session)
    session.routers = routers_of(several(*names))

    def parts(module, router):
        prepared.append(router)
        side = SideData(torch.zeros(6), 1.0)
        return stack_of(router, dict.fromkeys(KNOWN, 2), 0, 6, 8, side=lambda name: side).parts()

    monkeypatch.setattr(session, "parts", parts)
    layer._probe_factors(session, torch.zeros(0))
    assert set(prepared) <= set(session.routers.by_name.values())


def test_updates_that_are_more_than_factors_are_refused(tmp_path):
    moved_adapter(tiny_llama(), tmp_path / "ants", 1, use_dora=True)
    with pytest.raises(CompositionError, match=r"'ants' is no plain LoRA adapter \(DoRA\).*vLLM reads factors only"):
        session_of(tmp_path, ())
