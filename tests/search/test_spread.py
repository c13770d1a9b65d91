"""A search over several processes: the same values whoever finds them, several proposals at a time, one who speaks."""

import json
from pathlib import Path

import pytest
from tests.search.test_refine import World, menus_of
from tests.train import several

from perjoule.search.crew import Crew, _cores
from perjoule.search.refine import Evaluated, _ceilings
from perjoule.train.spread import Spread

HERE = Path(__file__).parent
LOADED = "perjoule.search.optimize perjoule.search.assist onnxruntime tests.search.workloads"


class Listening(World):
    """Hears of every batch, and sees that nothing else is asked."""

    def together(self, keep, evaluations, at_once):
        from perjoule.search.refine import refine

        self.batches, self.announced = [], []

        def ahead(batch):
            assert not self.announced, "the batch before was evaluated"
            self.batches.append(len(batch))
            self.announced = [a.key for a in batch]

        def evaluate(allocation, label):
            assert self.announced.pop(0) == allocation.key
            return self.evaluate(allocation, label)

        return refine(
            [self.problem], self.uniform(), evaluate, keep=keep, evaluations=evaluations, at_once=at_once, ahead=ahead
        )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_proposals_come_several_at_a_time(seed, at_once):
    world = Listening(menus_of(6, seed))
    found = world.together(0.98, 12, at_once)
    assert len({e.allocation.key for e in found}) == len(found) <= 12
    assert world.batches[0] == 2, "the uniform ones"
    assert max(world.batches[1:]) == at_once
    searched = [e.label for e in found[2:]]
    assert searched == [f"search {n}" for n in range(3, len(found) + 1)]
    passing = [e.allocation.cost for e in found if e.relative >= 0.98]
    assert min(passing) <= min(e.allocation.cost for e in found[:2] if e.relative >= 0.98)
    assert min(passing) <= 1.1 * world.cheapest(0.98), "however many at a time"
    if at_once == 1:
        assert [(e.label, e.allocation.key) for e in found] == [
            (e.label, e.allocation.key) for e in World(menus_of(6, seed)).refine(0.98, 12)
        ]


def test_several_ceilings_cut_the_interval_into_equal_parts():
    seen = [
        Evaluated(allocation=None, label="", distance=d, relative=r) for d, r in ((1e-4, 0.999), (1e-2, 0.9))
    ]  # fmt: skip
    one, three = (list(_ceilings(seen, 0.99, n)) for n in (1, 3))
    assert one == pytest.approx([1e-3, 10**-2.5, 10**-3.5, 10**-2.2])
    assert three[:3] == pytest.approx([1e-3, 10**-3.5, 10**-2.5])


def test_alone_a_crew_is_a_loop():
    done, steps = [], []
    crew = Crew(Spread.alone())
    crew.meet(None, None)
    assert crew.ask("anything", [3, 4], lambda x: done.append(x) or x * x, step=lambda: steps.append(1)) == [9, 16]
    assert (done, len(steps), crew.size, crew.elsewhere) == ([3, 4], 2, 1, 0)
    crew.dismiss()


CREW = """
import json, sys, time
import torch
from perjoule.compress.apply import Applier
from perjoule.core.budget import Budget
from perjoule.core.codec import to_json
from perjoule.core.errors import PerjouleError
from perjoule.core.record import Recipe, Step
from perjoule.measure.forward import answers
from perjoule.search.crew import Crew, _cores
from perjoule.search.assist import Helper, answered_after
from perjoule.search.judge import Judge
from perjoule.search.original import Known
from perjoule.search.sensitivity import Assessor, assess
from perjoule.search.settings import Settings
from perjoule.train.spread import launched
from tests.search import workloads
def main():
    with launched() as spread:
        torch.manual_seed(spread.rank)  # a model that is another one in every process
        workload = workloads.plain()
        for p in workload.model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        if sys.argv[1] == "other data" and spread.rank == 1:
            workload.evaluation[0]["input"].add_(1)
        if not spread.first:
            helper = Helper(workload, Budget(), 0, Settings(), spread)
            began, threads = time.process_time(), torch.get_num_threads()
            helper.serve()
            print(json.dumps([time.process_time() - began, threads]))
            return
        known = Known(workload)
        reference = answers(known.model, known.workload.evaluation).numpy()
        known.judge = Judge(known.workload, reference, Budget())
        crew = Crew(spread)
        crew.meet(known.model, reference)
        if sys.argv[1] == "other data":
            crew.ask("evaluate", [], None)
        known.find()
        sensed, stats = known.statistics(known.calibration(Settings()), 0)
        applier = Applier(known.model, known.sites, known.groups, stats)
        forms = [{"name": "Grid", "bits": b} for b in (8, 4, 3, 2)] + [{"name": "Sparse", "density": 0.5}]
        steps = [Step(sites=("0", "2"), form=f, saliency="second_order", fit="second_order") for f in forms]
        recipes = [Recipe(steps=(s,)) for s in steps]
        alone = [answered_after(applier, r, known) for r in recipes]
        mine = []
        def work(recipe):
            mine.append(recipe)
            return answered_after(applier, recipe, known)
        given = known.model, known.sites, known.groups, stats, sensed, known.calibration(Settings()), 0, "energy"
        by_one = to_json(assess(Assessor(*given), lambda: None))
        by_all = to_json(assess(Assessor(*given), lambda: None, crew))
        about = {"sites": [s.name for s in known.sites], "groups": [g.name for g in known.groups]}
        about["objective"] = "energy"
        stepped = []
        found = crew.ask("evaluate", recipes, work, about, lambda: stepped.append(1))
        again = crew.ask("evaluate", recipes[:1], work, about)
        time.sleep(0.5)  # what is timed is timed while the others sleep
        crew.dismiss()
        print(json.dumps([alone, found, again, len(mine), len(stepped), by_one, by_all]))
try:
    main()
except PerjouleError as error:
    print(type(error).__name__, error)
    sys.exit(2)
"""


def test_every_rank_finds_the_same_values():
    zero, one = several.run(2, CREW, "", loaded=LOADED)
    assert (zero.code, one.code) == (0, 0), (zero, one)
    alone, found, again, mine, steps, by_one, by_all = json.loads(zero.out)
    for site, damages in by_one["of_option"].items():
        assert by_all["of_option"][site] == pytest.approx(damages, rel=1e-3)
    assert len(by_one["of_width"]) == 2, "groups"
    for group, damages in by_one["of_width"].items():
        assert by_all["of_width"][group] == pytest.approx(damages, rel=1e-3)
    assert by_all["refused"] == by_one["refused"]
    for expected, value in zip(alone, found, strict=True):
        assert value == pytest.approx(expected, rel=1e-4), "rank 0's weights are everybody's"
    assert len({tuple(v) for v in found}) == 5
    assert again == found[:1]
    assert (mine, steps) == (4, 5), "three of five, one of one; all are counted"
    spent, threads = json.loads(one.out)
    assert threads == max(1, _cores() // 2), "while two share the cores"
    assert spent < 0.4, "CPU seconds of the helper, 0.5 s waited included"


def test_other_data_in_one_process_are_refused():
    zero, one = several.run(2, CREW, "other data", loaded=LOADED)
    assert one.out.startswith("WorkloadError process 1 of 2 has other evaluation data than the first")
    assert zero.out.startswith("ProcessLost the 2 processes cannot go on together: process 1 of 2: process 1 of 2 has")
    assert (zero.code, one.code) == (2, 2)


RUN = """
import functools
import perjoule.search.optimize as job
from perjoule.cli.main import main
from perjoule.search import cost
job.Settings = functools.partial(job.Settings, rounds=3, window_s=0.01, repair_s=0.2, versions=1)
cost.WINDOW_S = 0.001
main()
"""


@pytest.mark.slow
def test_a_run_over_two_processes_speaks_with_one_voice(tmp_path):
    given = ["--target", "onnxruntime", "--evaluations", "4", "--out", tmp_path, "--json"]
    zero, one = several.run(2, RUN, "optimize", f"{HERE / 'workloads.py'}:plain", *given, loaded=LOADED)
    assert (zero.code, one.code) == (0, 0), zero.err
    assert (one.out, one.err) == ("", "")
    result = json.loads(zero.out)
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()[1:]]
    values = {line["key"]: line["value"]["value"] for line in lines}
    assert values["evaluations at once"] == 2
    assert sum(key.startswith("evaluate ") for key in values) == result["evaluations"] == 4
    assert json.loads((tmp_path / "result.json").read_text()) == result
