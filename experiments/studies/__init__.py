"""What an experiment does, by the kind of question that it asks.

Each study is a module with

    MAKES                                  the kind of cell that makes an arm's model: train, or build
    plan(experiment) -> [Cell]             every cell, in the order in which it runs
    turns(cell, experiment)                a key: neighbours with the same one take turns; None: the cell runs by itself
    together(cell, experiment)             a key: cells of such a group with the same one share a process; None: its own
    lengths(experiment, causal)            the longest sequences that a run makes, by the setting that says so
    work(cell, experiment)                 the function that does a cell in a fresh process, and its arguments
    work_together(cells, experiment)       the same for cells that share one, where there are any: a list of results
    rows(cell, result, experiment, run)    the rows of result.json that a finished cell gives
    verdicts(rows, experiment)             the paired comparisons that were planned
    findings(rows, experiment, run)        what else the study says, a sentence each

pairing.py makes the paired comparisons that all of them ask for, and wording.py says them.
"""

from types import ModuleType

from experiments.studies import comparison, lineage, masking, memory, moe, sparse, speed, vocabulary

STUDIES: dict[str, ModuleType] = {
    "comparison": comparison, "lineage": lineage, "sparse": sparse, "moe": moe, "masking": masking,
    "vocabulary": vocabulary, "memory": memory, "speed": speed,
}  # fmt: skip
