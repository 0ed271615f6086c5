"""Clients that differ are told apart from clients that do not, by gradients as by labels."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedmezo.channels import plain
from fedmezo.errors import ConfigError
from fedmezo.studies.config import parse_config
from fedmezo.studies.constants_table import heterogeneity_table
from fedmezo.studies.heterogeneity import distances, measure_heterogeneity
from fedmezo.studies.sampling import SamplingOptions

HISTOGRAMS = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 50), min_size=1), min_size=2, max_size=5
)


@given(HISTOGRAMS, st.permutations("abcdef"))
def test_distances_do_not_depend_on_what_labels_are_called(histograms, names):
    renamed = dict(zip("abcdef", names, strict=True))
    again = [{renamed[label]: many for label, many in histogram.items()} for histogram in histograms]
    for one, other in zip(distances(histograms), distances(again), strict=True):
        assert one == pytest.approx(other, abs=1e-12)


@given(HISTOGRAMS)
def test_distances_are_shares_and_the_divergence_lies_between_its_bounds(histograms):
    for variation, divergence in distances(histograms):
        assert 0 <= variation < 1 and 0 <= divergence < 1
        assert divergence <= variation + 1e-12  # Lin, 1991, theorem 3
        assert divergence >= variation**2 / 2 - 1e-12  # Pinsker, with room


def test_equal_clients_have_no_distance_and_disjoint_ones_half_of_it():
    assert distances([{"a": 2, "b": 4}, {"a": 1, "b": 2}]) == [(0, 0), (0, 0)]
    (variation, divergence), _ = distances([{"a": 5}, {"b": 5}])
    assert variation == 0.5 and divergence == pytest.approx(0.311278, abs=1e-6)
    assert distances([{}, {}]) == [(None, None), (None, None)]


def asked(kind):
    return parse_config(
        {
            "model": {"name": "builtin:tiny"},
            "data": {"name": "builtin:skills/kind,pairs,compare,initials", "template": "{input} ", "max_tokens": 32},
            "split": {"kind": kind},
            "federation": {"clients": 4, "batch_size": 4, "rounds": 1, "local_steps": 2},
            "runtime": {"threads": 1},
        }
    )


@pytest.fixture(scope="module")
def found():
    how = SamplingOptions(directions=24, batches=3, points=2, resamples=200)
    return {kind: measure_heterogeneity(asked(kind), asked=how) for kind in ("iid", "meta")}


def test_clients_with_labels_of_their_own_differ_more(found):
    iid, meta = found["iid"], found["meta"]
    assert max(row.total_variation for row in iid.clients) < 0.2 < min(row.total_variation for row in meta.clients)
    assert iid.intervals["apart2"][0] < 0 < meta.intervals["apart2"][0]
    assert meta.apart2 / meta.gradient2 > 2 * iid.apart2 / iid.gradient2
    assert meta.c_h * meta.gradient2 + meta.sigma_h2 > 2 * (iid.c_h * iid.gradient2 + iid.sigma_h2)
    assert iid.labels == meta.labels == "category"


def test_rows_and_correlations_are_plain_and_whole(found):
    for one in found.values():
        told = json.loads(json.dumps(plain(one.as_dict()), allow_nan=False))
        assert [row["client"] for row in told["clients"]] == [0, 1, 2, 3]
        names = set(one.correlations)
        assert names == {
            "examples", "loss", "gradient2", "apart2", "cosine", "total_variation", "jensen_shannon",
        }  # fmt: skip
        for name, others in one.correlations.items():
            assert set(others) == names - {name}
            assert all(value is None or -1 - 1e-9 <= value <= 1 + 1e-9 for value in others.values())
        assert one.correlations["loss"]["apart2"] == one.correlations["apart2"]["loss"]
    assert found["meta"].correlations["total_variation"]["jensen_shannon"] > 0.5


def test_the_table_shows_every_client_and_its_interval(found):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(heterogeneity_table(found["meta"]))
    text = console.export_text()
    for row in found["meta"].clients:
        assert f"{row.apart2:.3g} ±" in text
    assert "Distances of labels by category." in text and "Assumption 6 over 2 points: c_h = " in text


def test_a_single_client_is_refused():
    config = asked("iid")
    alone = config.model_copy(update={"federation": config.federation.model_copy(update={"clients": 1})})
    with pytest.raises(ConfigError, match="nobody to differ from"):
        measure_heterogeneity(alone)
