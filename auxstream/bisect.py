"""Which regions make the results differ? Halves are switched off until single ones are left.

Enters: names of regions, and a test that says whether the results differ with some of them on. Leaves: the causes: sets
of regions, each of which makes them differ by itself and has no part that does. Pure; `run.py` gives the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Regions = tuple[str, ...]


class Unsteady(Exception):
    """A set of regions differed, and neither did its parts nor the set again: what it names is no cause."""


def find_causes(regions: Sequence[str], differs: Callable[[Regions], bool]) -> list[Regions]:
    """Every cause. A cause of several regions differs only with all of them on. With all causes off, nothing differs:
    that was tested last.

    Args:
        regions: all of them, in the order of the model.
        differs: whether the results differ with these on and all others off. One that fails now and then must be
            repeated inside.

    Raises:
        Unsteady: `differs` contradicts itself.
    """
    causes: list[Regions] = []
    rest = tuple(regions)
    while rest and differs(rest):
        found = _causes(rest, (), differs)
        causes += found
        taken = {region for cause in found for region in cause}
        rest = tuple(region for region in rest if region not in taken)
    return causes


def _causes(suspects: Regions, beside: Regions, differs: Callable[[Regions], bool]) -> list[Regions]:
    """Causes within `suspects`, all with `beside` on, which does not differ by itself while both together do."""
    if len(suspects) == 1:
        return [suspects]
    half = len(suspects) // 2
    one, other = suspects[:half], suspects[half:]
    guilty = [side for side in (one, other) if differs((*side, *beside))]
    if guilty:
        return [cause for side in guilty for cause in _causes(side, beside, differs)]
    # Each half needs something of the other.
    mine = _causes(one, (*other, *beside), differs)[0]
    theirs = _causes(other, (*mine, *beside), differs)[0]
    together = (*mine, *theirs)
    if not differs((*together, *beside)):
        raise Unsteady(", ".join(together))
    return [together]
