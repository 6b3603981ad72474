"""Several routers of one model: a request of each in one batch is answered as where its router is all there is."""

import pytest
import torch

import spectr
from models import close, greedy
from rows import PROMPTS, SETS, alone, composed, ids_of, together
from spectr import Calibrated, compose
from spectr.composition.multi_router import MultiRouter
from spectr.composition.router_batch import RouterBatch
from spectr.errors import CompositionError
from text_model import make_model

ROUTERS = {
    "calibrated": Calibrated(),
    "spectr": spectr.Spectr(top_k=2),
    "calibrated-prior": Calibrated(level="prior"),
    "arrow": spectr.Arrow(top_k=2),
    "calibrated-token": Calibrated(level="token", top_k=2),
    "ties": spectr.Spectr(top_k=3, weights="softmax", combine="ties"),
    "uniform": spectr.Uniform(),
    "lag": spectr.Lag(shortlist=2, top_k=1),
    "projection": spectr.Spectr(top_k=2, score="projection"),
    "glider": spectr.Glider(token_router=spectr.Arrow(), alpha=2.0),
}


def multi_router(library, *names):
    makers = {name: lambda model, router=ROUTERS[name]: composed(library, router, model) for name in names or ROUTERS}
    return MultiRouter(make_model(), makers)


def requests_of(batch, routers, shift=0):
    """Rules and prompts: every router with another set and another prompt than its neighbours."""
    found = []
    for number, router in enumerate(routers):
        names, ids = SETS[(number + shift) % len(SETS)], ids_of(PROMPTS[(2 * number + shift) % len(PROMPTS)])
        found.append((router, names, ids, batch.decide(router, names, ids)))
    return found


def check(library, batch, requests):
    model = batch.multi_router.model
    logits = together(model, batch, [(decision, ids) for *_, ids, decision in requests])
    for found, (router, names, ids, _) in zip(logits, requests, strict=True):
        close(found, alone(library, ROUTERS[router], names, ids), 2e-5)


@pytest.mark.parametrize("shift", range(3))
def test_each_request_of_a_batch_is_answered_by_its_own_router_and_set(library, shift):
    batch = RouterBatch(multi_router(library))
    order = [*ROUTERS, "spectr", "spectr", "calibrated", "arrow", "calibrated"]  # side by side, and apart
    check(library, batch, requests_of(batch, order, shift))


def test_steps_of_one_router_after_the_other_leave_nothing_behind(library):
    batch = RouterBatch(multi_router(library, "calibrated", "spectr", "arrow"))
    for routers in (["spectr"], ["arrow", "calibrated"], ["calibrated"] * 3, ["spectr", "arrow", "spectr"], ["arrow"]):
        for shift in range(3):
            check(library, batch, requests_of(batch, routers, shift))


def test_what_is_seen_is_what_each_router_alone_shows(library):
    batch = RouterBatch(multi_router(library))
    requests = [request for request in requests_of(batch, [*ROUTERS, "spectr", "arrow"]) if request[1]]
    spans = [(decision, len(ids)) for *_, ids, decision in requests]
    batch.set_tokens(spans)
    batch.watch(range(1, len(spans)), layers=True)
    together(batch.multi_router.model, batch, [(decision, ids) for *_, ids, decision in requests])
    looks = batch.seen()
    assert set(looks) == set(range(1, len(spans)))
    for number, look in looks.items():
        router, names, ids, _ = requests[number]
        routed = composed(library, ROUTERS[router]).allow(names)
        with spectr.trace(routed.model) as trace, torch.no_grad():
            routed.model(input_ids=ids[None])
        for told, layer in zip(look.layers, trace.values(), strict=True):
            scores, weights = (t[0, -1].tolist() for t in layer.steps[-1])
            rows = zip(layer.experts, weights, scores, strict=True)
            assert told == {n: pytest.approx((w, s), rel=1e-4, abs=1e-5) for n, w, s in rows if w}


def test_after_an_expert_is_discarded_no_router_has_it(library):
    batch = RouterBatch(multi_router(library, "calibrated", "spectr", "uniform"))
    ids = ids_of(PROMPTS[1])
    kept = [(name, ("ants", "bees"), ids, batch.decide(name, ("ants", "bees"), ids)) for name in ("spectr", "uniform")]
    batch.discard("cats")
    assert batch.multi_router.experts == ("ants", "bees")
    for routed in batch.multi_router.compositions.values():
        assert all(layer.experts == ("ants", "bees") for layer in routed.layers.values())
    fresh = [("calibrated", ("bees",), ids, batch.decide("calibrated", ("bees",), ids))]
    check(library, batch, [*kept, *fresh])


def test_factors_that_are_equal_are_in_memory_once(library):
    names = ("spectr", "arrow", "uniform", "calibrated", "calibrated-prior", "projection")
    made = multi_router(library, *names)
    for discarded in (False, True):
        layers = {name: next(iter(made.compositions[name].layers.values())) for name in names}
        assert layers["spectr"].A_PI is layers["arrow"].A_PI is layers["uniform"].A_PI
        assert layers["calibrated"].B_OP is layers["calibrated-prior"].B_OP
        assert layers["calibrated"].A_PI is not layers["spectr"].A_PI
        taken = made.bytes
        assert taken["uniform"] == taken["calibrated-prior"] == 0
        prototypes = sum(layer.prototypes_EI.nbytes for layer in made.compositions["arrow"].layers.values())
        assert taken["arrow"] == prototypes
        assert taken["spectr"] > taken["projection"] > prototypes
        if not discarded:
            for routed in made.compositions.values():
                routed.discard("bees")
            made.refresh()


def test_the_weights_are_in_memory_once_and_keep_their_names(library):
    plain = make_model()
    model = multi_router(library, "spectr", "arrow").model
    assert list(model.state_dict()) == list(plain.state_dict())
    made = multi_router(library, "spectr", "arrow")
    weights = {t.data_ptr() for t in made.model.parameters()}
    for routed in made.compositions.values():
        assert {t.data_ptr() for t in routed.model.parameters()} == weights
    other = make_model(seed=1)
    made.model.load_state_dict(other.state_dict())
    for routed in made.compositions.values():
        close(routed.remove()(input_ids=ids_of(PROMPTS[0])[None]).logits, other(ids_of(PROMPTS[0])[None]).logits)


def test_a_router_alone_composes_the_model_itself(library):
    model = make_model()
    alone = MultiRouter(model, {"spectr": lambda model: compose(model, library, ROUTERS["spectr"])})
    assert alone.compositions["spectr"].model is alone.model is model
    assert not alone._multi_routed


def test_closing_gives_every_token_to_the_default_router(library):
    made = multi_router(library, "spectr", "calibrated")
    batch, ids = RouterBatch(made), ids_of(PROMPTS[1])
    check(library, batch, requests_of(batch, ["calibrated", "spectr"]))
    batch.close()
    routed = composed(library, ROUTERS["spectr"]).model
    assert torch.equal(greedy(made.model, ids[None], 4), greedy(routed, ids[None], 4))


def test_routers_that_hold_other_experts_than_the_others_are_refused(library):
    model = make_model()
    makers = {
        "spectr": lambda model: compose(model, library, ROUTERS["spectr"]),
        "oracle": lambda model: compose(model, library, spectr.Oracle(expert="bees")),
    }
    with pytest.raises(
        CompositionError, match="router 'oracle' holds bees, but router 'spectr' holds ants, bees, cats"
    ):
        MultiRouter(model, makers)
    compose(model, library, ROUTERS["spectr"])  # it is as it was


def test_a_model_of_several_routers_is_composed_already(library):
    with pytest.raises(CompositionError, match="composed already"):
        compose(multi_router(library, "spectr", "arrow").model, library, ROUTERS["spectr"])
