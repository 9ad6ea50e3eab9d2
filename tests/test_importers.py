"""Other engines' recordings: what was written comes back, what does not fit is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import recordings as known
from moe_runtime import ConfigError, RoutingCounts, RoutingTrace, TraceError
from moe_runtime.importers import FORMS, Facts, detect, import_recording, read_recording

RECORDINGS = Path(__file__).parent / "data" / "recordings"
FACTS = Facts(
    hidden_layers=known.LAYERS, experts=(known.EXPERTS,), top_k=known.TOP_K, model_id="some/model"
)


def read(paths: Any, facts: Facts = FACTS, **how: Any) -> RoutingTrace:
    found = read_recording(paths, facts=facts, **how)
    assert isinstance(found, RoutingTrace)
    return found


def read_counts(paths: Any, facts: Facts = FACTS) -> RoutingCounts:
    found = read_recording(paths, facts=facts)
    assert isinstance(found, RoutingCounts)
    return found


def in_order(trace: RoutingTrace) -> dict[str, np.ndarray[Any, Any]]:
    """The columns by sequence and position: recordings batch sequences in other ways."""
    order = np.lexsort((trace.positions, trace.sequence_ids))
    return {name: column[order] for name, column in trace.columns().items()}


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(known.WRITERS) - known.COUNTED))
def test_tokens_come_back(name: str, tmp_path: Path) -> None:
    form, write = known.WRITERS[name]
    expected = known.known_trace(3)
    paths = write(tmp_path, expected)
    assert {detect(path) for path in paths} == {form}
    found = read(paths)
    assert found.description() == expected.description()
    unknown = {
        "vllm npy": {"topk_weights", "token_ids", "phase", "step_ids"},
        "vllm responses": {"topk_weights"},
        "sglang responses": {"topk_weights", "token_ids"},
        "sglang per_token": {"topk_weights", "step_ids"},
        "route-csv": {"token_ids"},
    }.get(name, set())
    mine, theirs = in_order(found), in_order(expected)
    for column in set(theirs) - unknown:
        if column == "topk_weights":
            np.testing.assert_allclose(mine[column], theirs[column], atol=1e-3)
        else:
            np.testing.assert_array_equal(mine[column], theirs[column], err_msg=column)
    assert ("topk_weights" in unknown) == (not found.topk_weights.any())
    if "token_ids" in unknown:
        assert (found.token_ids == -1).all()


@pytest.mark.parametrize("name", sorted(known.COUNTED))
def test_counts_come_back(name: str, tmp_path: Path) -> None:
    expected = known.known_trace(4)
    paths = known.WRITERS[name][1](tmp_path, expected)
    assert detect(paths[0]) == known.WRITERS[name][0]
    found = read_counts(paths)
    assert found.description() == RoutingCounts.from_trace(expected).description()
    for at in range(len(expected.layer_ids)):
        wanted = RoutingCounts.from_trace(expected).counts[at]
        np.testing.assert_array_equal(found.counts[at], wanted)
    assert found.tokens == (len(expected) if name == "trtllm" else 0)


@pytest.mark.parametrize("name", known.WRITERS)
def test_a_file_is_written_whole(name: str, tmp_path: Path) -> None:
    form, write = known.WRITERS[name]
    paths = write(tmp_path, known.known_trace(4))
    out = tmp_path / "out" / "x"
    done = import_recording(paths, out, form=form, facts=FACTS)
    if name in known.COUNTED:
        assert done.path.name == "x.counts.safetensors"
        loaded: Any = RoutingCounts.load(done.path)
        assert done.counts is not None
    else:
        assert done.path.name == "x.trace.safetensors"
        loaded = RoutingTrace.load(done.path)
        whole = read(paths)
        for column, values in whole.columns().items():
            np.testing.assert_array_equal(getattr(loaded, column), values, err_msg=column)
        assert done.tokens == len(whole) == 40
    assert loaded.description() == done.description
    assert [path.name for path in out.parent.iterdir()] == [done.path.name]
    other = "x.trace.safetensors" if name in known.COUNTED else "x.counts.safetensors"
    with pytest.raises(TraceError, match="name it"):
        import_recording(paths, out.with_name(other), facts=FACTS)


def test_a_single_layer_is_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[[1, 0]], [[2, 1]]], np.uint8))
    assert read(path, Facts(experts=(3,))).layer_ids == (0,)


def test_two_files_of_sglang_ranks_with_the_same_tokens_count_once(tmp_path: Path) -> None:
    trace = known.known_trace(2)
    for rank in range(2):
        torch.save(known.per_token_records(trace, rank), tmp_path / f"a_{rank}.pt")
    torch.save(known.per_token_records(known.known_trace(2, seed=9)), tmp_path / "a_2.pt")
    notes: list[str] = []
    found = read(sorted(tmp_path.glob("*.pt")), note=notes.append)
    assert len(found) == 40
    assert len(np.unique(found.sequence_ids)) == 4
    assert any("a_1.pt: the same tokens as a_0.pt" in note for note in notes)


def test_sglang_leaves_out_what_its_prefix_cache_had(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    trace = known.known_trace(1)
    meta = {
        "prompt_tokens": 6,
        "completion_tokens": 5,
        "routed_experts": known.raw_base64(trace[2:]),
    }
    path.write_text(json.dumps({"meta_info": meta}))
    found = read(path)
    assert found.positions.tolist() == list(range(2, 10))
    assert found.phase.tolist() == [0] * 4 + [1] * 4


def test_long_prompts_are_read_in_pieces(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ids = random.random((20_000, 2, 6)).argsort(axis=2)[:, :, :2].astype(np.uint16)
    np.save(tmp_path / "x.npy", ids)
    found = read(tmp_path / "x.npy", Facts(experts=(6,)))
    np.testing.assert_array_equal(found.topk_ids, ids)
    assert np.bincount(found.step_ids).tolist() == [8192, 8192, 3616]
    assert found.positions.tolist() == list(range(20_000))


# -- layers ----------------------------------------------------------------------------------------


def test_layers_can_be_said(tmp_path: Path) -> None:
    trace = known.known_trace(1)
    whole, moe_only = tmp_path / "whole.npy", tmp_path / "moe.npy"
    np.save(whole, known.hidden_layers(trace.topk_ids))
    np.save(moe_only, trace.topk_ids)
    said = replace(FACTS, moe_layers=(1, 2, 3, 4))
    for path, facts in [
        (whole, replace(FACTS, first_dense=1)),
        (whole, said),
        (moe_only, replace(said, hidden_layers=0)),
    ]:
        found = read(path, facts)
        assert found.layer_ids == (1, 2, 3, 4)
        np.testing.assert_array_equal(found.topk_ids, trace.topk_ids)
    for facts, message in [
        (replace(FACTS, first_dense=2), "layer 1 has experts in the file, but is not among"),
        (replace(FACTS, first_dense=5), "none with experts is left"),
        (replace(FACTS, hidden_layers=6), "has 5 layers, but the model is said to have 6"),
        (replace(FACTS, moe_layers=(1, 2, 5)), "layer 5 of the 3 MoE layers given is missing"),
        (replace(FACTS, experts=(6,)), "expert .* but the layer has 6 experts"),
        (replace(FACTS, experts=(6, 6)), "2 numbers of experts for 4 MoE layers"),
        (replace(FACTS, experts=()), "does not say how many experts"),
        (replace(FACTS, top_k=4), "has 3 experts a token, but top-k 4"),
    ]:
        with pytest.raises(TraceError, match=message) as caught:
            read(whole, facts)
        assert str(whole) in str(caught.value)


def test_with_top_1_a_layer_of_zeros_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.array([[[0], [1]], [[0], [2]]], np.uint8))
    with pytest.raises(TraceError, match="layer 0 holds only expert 0"):
        read(path, Facts(experts=(3,)))
    assert read(path, Facts(experts=(3,), first_dense=0)).layer_ids == (0, 1)
    assert read(path, Facts(experts=(3,), first_dense=1)).layer_ids == (1,)


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts": (0,)},
        {"hidden_layers": -1},
        {"moe_layers": (1, 1)},
        {"moe_layers": (1,), "first_dense": 1},
    ],
)
def test_impossible_facts_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Facts(**wrong)


# -- bad input -------------------------------------------------------------------------------------


def _npy(change: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        np.save(path, change(known.hidden_layers(known.known_trace(1).topk_ids.astype(np.int32))))

    return write


def _set(array: np.ndarray[Any, Any], at: Any, value: int) -> np.ndarray[Any, Any]:
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_npy(lambda a: _set(a, (3, 2, 1), 12)), "token 3 layer 2: expert 12.*12 experts"),
        (_npy(lambda a: _set(a, (3, 2, 1), -2)), "token 3 layer 2: expert -2"),
        (_npy(lambda a: _set(a, (3, 2), 5)), "token 3 layer 2: expert 5 is chosen twice"),
        (_npy(lambda a: a[:0]), r"found \[0, 5, 3\]"),
        (_npy(lambda a: a[0]), r"found \[5, 3\]"),
        (_npy(lambda a: a * 0), "no layer has experts"),
        (_npy(lambda a: a * 1.0), "numbers of type f8"),
        (_npy(lambda a: a == 1), "numbers of type b1"),
        (lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), "holds objects"),
        (lambda p: p.write_bytes(known.npy_bytes(np.ones((4, 4, 4), int))[:-1]), "needs 512 bytes"),
        (lambda p: p.write_bytes(b""), "cannot be read|is empty"),
        (lambda p: p.write_bytes(b"\x93NUMPY"), "not a .npy array"),
        (lambda p: None, "cannot be read"),
    ],
)
def test_bad_arrays_are_named(write: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    write(path)
    with pytest.raises(TraceError, match=message) as caught:
        import_recording(path, tmp_path / "out" / "x", facts=FACTS)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_requests_of_another_model_are_refused(tmp_path: Path) -> None:
    paths = known.write_npy(tmp_path, known.known_trace(1))
    np.save(tmp_path / "other.npy", np.ones((2, 4, 3), np.uint8))
    with pytest.raises(TraceError, match=r"other\.npy: \[layers, experts a token\] is \[4, 3\]"):
        read([*paths, tmp_path / "other.npy"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["records"][1].pop("input_ids"), "record 1: input_ids"),
        (lambda d: d["records"][1]["positions"].append(3), "record 1: .*positions 3"),
        (lambda d: d["records"][0].update(extend_seq_lens=[1, 2]), "record 0: extend_seq_lens"),
        (lambda d: d["records"][1].pop("topk_ids_of_layer"), "record 1 has no topk_ids_of_layer"),
        (
            lambda d: d["records"][1]["topk_ids_of_layer"][1, 0, 0].fill_(99),
            "layer 1: physical exp",
        ),
        (lambda d: d["records"][2]["topk_ids_of_layer"][2, 0, :3].fill_(3), "layer 2: .*twice"),
        (lambda d: d["records"][0]["topk_ids_of_layer"][0].fill_(1), "top-k|is chosen twice|expe"),
        (lambda d: d["records"].clear(), "has no records"),
        (lambda d: d.pop("last_physical_to_logical_map"), "last_physical_to_logical_map"),
        (lambda d: d["last_physical_to_logical_map"][3].fill_(0), "layer 3 has no slot for exp"),
        (lambda d: d["last_physical_to_logical_map"][3].fill_(99), "layer 3 slot 0 holds expe"),
        (lambda d: d.pop("records"), "neither 'logical_count' nor 'records'"),
        (lambda d: d.update(records=[1]), "no mapping"),
        (
            lambda d: d["records"][1].update(
                topk_ids_of_layer=torch.zeros(1, 1, 1, dtype=torch.int32).expand(5, 1 << 40, 8)
            ),
            "more than the file holds",
        ),
    ],
)
def test_bad_dumps_are_named(
    change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    dump = known.per_token_records(known.known_trace(2))
    change(dump)
    path = tmp_path / "x.pt"
    torch.save(dump, path)
    with pytest.raises(TraceError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


class Evil:
    """What a pickle must not bring to life."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("run",))


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"logical_count": Evil()}, path)
    with pytest.raises(TraceError, match="cannot be loaded"):
        read_recording(path)
    torch.save({"logical_count": torch.ones(2, 2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TraceError, match=r"not a \.pt archive"):
        read_recording(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.tensor([[0.0, 1], [2, float("nan")]]), "layer 1 expert 1 has count nan"),
        (torch.tensor([[0, 1], [2, -3]]), "layer 1 expert 1 has count -3"),
        (torch.zeros(2, 2), "no layer has experts"),
        (torch.zeros(2), "shape"),
        (torch.ones(2, 2, dtype=torch.bool), "torch.bool"),
        ([[1, 2]], "no tensor: list"),
    ],
)
def test_bad_counts_are_named(counts: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"logical_count": counts}, path)
    with pytest.raises(TraceError, match=message) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)


def test_counts_of_another_model_or_mode_are_refused(tmp_path: Path) -> None:
    paths = known.write_stat(tmp_path, known.known_trace(2))
    torch.save({"logical_count": torch.ones(5, 13)}, tmp_path / "other.pt")
    with pytest.raises(TraceError, match=r"other\.pt: has \[layers, experts\] \[5, 13\]"):
        read_counts([*paths, tmp_path / "other.pt"])
    with pytest.raises(TraceError, match="mode per_pass, the first is of stat"):
        read_counts([*paths, *known.write_per_pass(tmp_path, known.known_trace(2))])
    with pytest.raises(TraceError, match="layer 1 has 12 experts, but 13 are said"):
        read_counts(paths, replace(FACTS, experts=(13,)))


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "rank1.safetensors"
    tensors: dict[str, Any] = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _rewrite(f, lambda t: t.pop("1_3")), "layer 3 is missing in iteration 1"),
        (lambda f: _rewrite(f, lambda t: [t.pop("0_3"), t.pop("1_3")]), "layer 3 is not in all"),
        (lambda f: _rewrite(f, lambda t: t.update(x=t.pop("1_3"))), "'x' is not named"),
        (lambda f: _rewrite(f, lambda t: t.update({"1_3": -t["1_3"]})), r"\(layer 3\) has count -"),
        (
            lambda f: _rewrite(f, lambda t: t.update({"1_3": t["1_3"][:5]})),
            r"\(layer 3\) has shape \(5,\).*12 experts",
        ),
        (lambda f: _rewrite(f, lambda t: t.clear()), "holds no counts"),
        (lambda f: (f / "rank0.safetensors").unlink(), "rank0.safetensors is missing"),
        (lambda f: (f / "rank1.safetensors").write_bytes(b"12"), "not a complete safetensors"),
        (lambda f: (f / "meta_info.json").unlink(), "meta_info.json: cannot be read"),
        (lambda f: (f / "meta_info.json").write_text("{}"), "'num_experts' is missing"),
        (lambda f: (f / "meta_info.json").write_text("{"), "not JSON"),
    ],
)
def test_bad_statistics_are_named(
    change: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    (folder,) = known.write_trtllm(tmp_path, known.known_trace(4))
    change(folder)
    with pytest.raises(TraceError, match=message) as caught:
        read_counts(folder)
    assert str(folder) in str(caught.value)


def test_missing_layers_of_statistics_are_named(tmp_path: Path) -> None:
    (folder,) = known.write_trtllm(tmp_path, known.known_trace(4))
    for facts in (replace(FACTS, first_dense=0), replace(FACTS, moe_layers=(0, 1, 2, 3, 4))):
        with pytest.raises(TraceError, match="layer 0 is missing or too many"):
            read_counts(folder, facts)


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return edit


def _first(data: dict[str, Any], layer: str = "2") -> Any:
    return data["routes"][1]["layers"][layer]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: "", "is empty"),
        (lambda text: "{}", "not the JSON form of a routing recording"),
        (lambda text: text[:-9], "not the JSON form of a routing recording.*not JSON"),
        (_edit(lambda d: d["routes"].clear()), "'routes' is empty"),
        (_edit(lambda d: d["meta"].update(top_k=4)), "top_k is 4, but no token|top-k 3 is said"),
        (_edit(lambda d: d["meta"].update(num_experts=0)), "num_experts must be"),
        (_edit(lambda d: d["routes"][1]["layers"].pop("2")), "token 1 has 3 layers"),
        (_edit(lambda d: _first(d)["experts"].__setitem__(0, 12)), "token 1 layer 2: expert 12"),
        (_edit(lambda d: _first(d)["experts"].__setitem__(0, "1")), "token 1 layer 2: experts"),
        (_edit(lambda d: _first(d)["experts"].append(1)), "token 1 layer 2: 4 experts and 3"),
        (
            _edit(lambda d: _first(d).update(experts=[1, 2, 1])),
            "token 1 layer 2: expert 1 is.*twice",
        ),
        (
            _edit(lambda d: _first(d)["weights"].__setitem__(0, float("nan"))),
            "token 1 layer 2: routing weight nan",
        ),
        (_edit(lambda d: _first(d)["weights"].__setitem__(0, -1)), "routing weight -1.0"),
        (_edit(lambda d: _first(d)["weights"].__setitem__(0, 1e9)), "routing weight 1000000000"),
        (_edit(lambda d: d["routes"][1].update(phase="x")), "token 1: phase must be"),
        (_edit(lambda d: d["routes"][1].update(phase="decode")), "token 2 is of the prompt"),
        (_edit(lambda d: d["routes"][1].update(token_pos=-1)), "token 1: token_pos must be"),
    ],
)
def test_bad_json_recordings_are_named(
    edit: Callable[[str], str], message: str, tmp_path: Path
) -> None:
    (path,) = known.write_ocs_json(tmp_path, known.known_trace(1))
    path.write_text(edit(path.read_text()))
    with pytest.raises(TraceError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0,0,1,2,0,", "0,0,1,7,0,", "layer 7, but the model has 5"),
        ("n_expert=12", "n_expert=2", "expert .* but the layer has 2|has 2 experts, but 12"),
        ("n_expert=12", "", "n_expert in '# model='"),
        ("n_expert_used=3", "n_expert_used=4", "n_expert_used is 4, but a token has 3"),
        ("turn,phase", "torn,phase", "no column 'turn'"),
        ("0,0,1,2,0,", "1,0,1,2,0,", "turns"),
        ("0,0,1,2,1,", "0,0,1,2,0,", "step 1 layer 2: slot 0 is there twice"),
        ("0,0,1,2,1,", "0,0,1,2,x,", "not the CSV form"),
        ("0,0,1,2,1,", "0,0,1,2,1.5,", "slot is 1.5"),
        ("0,0,1,2,1,", "0,2,1,2,1,", "phase is 2"),
        ("0,1,7,2,", "0,1,9,2,", "layer 2 is missing|has 6 experts"),
    ],
)
def test_bad_csv_recordings_are_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    (path,) = known.write_route_csv(tmp_path, known.known_trace(1))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(TraceError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"choices": [{"text": "a"}]}', "no 'routed_experts'"),
        ('{"choices": [{"routed_experts": 3}]}', "must be base64"),
        ('{"choices": [{"routed_experts": "?"}]}', "not base64"),
        ('{"choices": [{"routed_experts": "AAAA"}]}', "3 bytes are no whole number of tokens"),
        ('{"choices": 3', "not JSON"),
        ("[1]", "a response is an object"),
        ("AAAA" * 10, "30 bytes are no whole number"),
    ],
)
def test_bad_responses_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        read(path, form="vllm")
    assert str(path) in str(caught.value)


def test_bare_numbers_need_their_shape(tmp_path: Path) -> None:
    path = tmp_path / "x.b64"
    trace = known.known_trace(1)
    path.write_text(known.raw_base64(trace))
    assert detect(path) == "sglang"
    np.testing.assert_array_equal(read(path).topk_ids, trace.topk_ids)
    with pytest.raises(TraceError, match="do not say their shape"):
        read(path, replace(FACTS, hidden_layers=0))
    path.write_text(base64.b64encode(known.npy_bytes(known.hidden_layers(trace.topk_ids))).decode())
    assert detect(path) == "vllm"
    np.testing.assert_array_equal(read(path).topk_ids, trace.topk_ids)


def test_forms_are_not_mixed_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    npy = known.write_npy(tmp_path, known.known_trace(1))
    with pytest.raises(TraceError, match="is of the form route-csv"):
        read([*npy, *known.write_route_csv(tmp_path, known.known_trace(1))])
    with pytest.raises(ConfigError, match="unknown form 'tutel'; known: auto, sglang"):
        read(npy, form="tutel")
    with pytest.raises(TraceError, match="give one file at least"):
        read([])
    known.known_trace(1).save(tmp_path / "x.trace.safetensors")
    with pytest.raises(TraceError, match="needs no import"):
        detect(tmp_path / "x.trace.safetensors")
    assert len(FORMS) == 5


def test_runs_of_different_models_are_refused(tmp_path: Path) -> None:
    paths = known.write_ocs_json(tmp_path, known.known_trace(2))
    paths[1].write_text(paths[1].read_text().replace("some/model", "other/model"))
    for attempt in (
        lambda: read(paths, Facts()),
        lambda: import_recording(paths, tmp_path / "out" / "x"),
    ):
        with pytest.raises(TraceError, match=r"run-1\.json has another model_id.*other/model"):
            attempt()
    assert not list((tmp_path / "out").glob("*"))


# -- excerpts of real recordings -------------------------------------------------------------------


def test_a_real_json_recording_is_read() -> None:
    found = read(RECORDINGS / "qwen1.5-moe-a2.7b.json", Facts())
    assert found.topk_ids.shape == (10, 4, 4)
    assert found.experts == (60,) * 4
    assert (found.prefill().tokens, found.decode().tokens) == (4, 6)
    assert found.step_ids.tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5, 6]
    assert found.token_ids[4] == 45747
    first = json.loads((RECORDINGS / "qwen1.5-moe-a2.7b.json").read_text())["routes"][4]
    assert found.topk_ids[4, 3].tolist() == first["layers"]["3"]["experts"]
    np.testing.assert_allclose(found.topk_weights[4, 3], first["layers"]["3"]["weights"], rtol=1e-3)


def test_a_real_csv_recording_is_read() -> None:
    found = read(RECORDINGS / "gpt-oss-120b.csv", Facts())
    assert found.topk_ids.shape == (10, 4, 2)
    assert found.experts == (128,) * 4
    assert found.positions.tolist() == list(range(82, 92))
    assert found.decode().tokens == 7
    assert found.topk_ids[0, 0].tolist() == [45, 72]
    assert found.model_id == "gpt-oss-120b-Q4_K_M.gguf"


def test_a_last_layer_that_prompt_tokens_skip_is_unused(tmp_path: Path) -> None:
    (path,) = known.write_route_csv(tmp_path, known.known_trace(1))
    kept = [
        line
        for line in path.read_text().splitlines()
        if not any(line.startswith(f"0,0,{step},4,") for step in range(5))
    ]
    path.write_text("\n".join(kept))
    found = read(path)
    assert (found.topk_ids[:5, 3] == 65535).all()
    assert (found.topk_ids[5:] < 12).all()
