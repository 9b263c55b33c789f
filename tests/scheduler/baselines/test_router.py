from loongjax.scheduler.baselines.router import Router
from tests.scheduler.views import cluster, running, waiting


def names(routed: dict[int, list]) -> dict[int, list[str]]:
    return {replica: [request.request_id for request in requests] for replica, requests in routed.items()}


def test_requests_go_where_the_fewest_tokens_are_one_after_the_other():
    waits = [waiting("a", 0, 50), waiting("b", 1, 30), waiting("c", 2, 10), waiting("d", 3, 10)]
    assert names(Router([0, 1]).route(cluster(2, waits=waits))) == {0: ["a"], 1: ["b", "c", "d"]}


def test_tokens_in_the_pool_count_like_those_that_wait():
    view = cluster(2, runs=[running("r", 0, (0, 40))], waits=[waiting("a", 1, 30), waiting("b", 2, 5)])
    assert names(Router([0, 1]).route(view)) == {0: [], 1: ["a", "b"]}


def test_a_prompt_that_is_partly_computed_counts_like_one_that_waits():
    part = running("part", 0, (0, 8), num_uncomputed_tokens=90)
    view = cluster(2, runs=[part, running("r", 1, (1, 40))], waits=[waiting("a", 2, 30), waiting("b", 3, 5)])
    assert names(Router([0, 1]).route(view)) == {0: [], 1: ["a", "b"]}


def test_keys_on_other_instances_do_not_count():
    view = cluster(4, runs=[running("r", 0, (3, 99))], waits=[waiting("a", 1, 30), waiting("b", 2, 5)])
    assert names(Router([0, 1]).route(view)) == {0: ["a"], 1: ["b"]}


def test_a_request_keeps_its_replica():
    router = Router([0, 1])
    assert names(router.route(cluster(2, waits=[waiting("a", 0, 50), waiting("b", 1, 30)]))) == {0: ["a"], 1: ["b"]}
    crowded = cluster(2, runs=[running("r", 5, (1, 90))], waits=[waiting("b", 1, 30)])
    assert names(router.route(crowded)) == {0: [], 1: ["b"]}


def test_a_copy_goes_its_own_way():
    router = Router([0, 1])
    router.copy().route(cluster(2, waits=[waiting("a", 0, 50), waiting("b", 1, 30)]))
    assert names(router.route(cluster(2, waits=[waiting("b", 1, 30)]))) == {0: ["b"], 1: []}


def test_those_who_are_gone_are_forgotten():
    router = Router([0, 1])
    for order in range(1000):
        router.route(cluster(2, waits=[waiting(f"r{order}", order, 10)]))
    assert len(router._replica_of) < 10
