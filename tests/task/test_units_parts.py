"""Some of the units by themselves: laid out, copied out, and put back where they were."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from task.units import Layout, make_layout
from tests.task.test_units import granularities, models


@st.composite
def layouts_and_units(draw):
    """A layout, and some of its units in any order."""
    layout = make_layout(draw(models), draw(granularities))
    return layout, draw(st.lists(st.sampled_from(layout.units), unique=True))


def ascending(layout):
    return torch.arange(layout.size, dtype=torch.float32)


@given(layouts_and_units())
def test_a_part_has_the_tensors_of_its_units_without_gaps(given):
    layout, units = given
    part = layout.part(units)
    expected = [(spec.unit, spec.name, spec.shape) for spec in layout.tensors if spec.unit in units]
    assert [(spec.unit, spec.name, spec.shape) for spec in part.tensors] == expected
    ends = [spec.offset + spec.size for spec in part.tensors]
    assert [spec.offset for spec in part.tensors] == [0, *ends[:-1]][: len(ends)]
    assert part.size == sum(layout.slices[unit].stop - layout.slices[unit].start for unit in units)


@given(layouts_and_units())
def test_a_part_is_in_order_of_the_layout_whatever_order_is_asked_for(given):
    layout, units = given
    assert layout.part(units).units == tuple(unit for unit in layout.units if unit in units)
    assert layout.part(units) == layout.part(units[::-1])
    assert torch.equal(layout.take(ascending(layout), units), layout.take(ascending(layout), units[::-1]))


@given(layouts_and_units())
def test_all_units_are_the_layout_and_none_are_an_empty_one(given):
    layout, _ = given
    assert layout.part(None) is layout
    assert layout.part(layout.units) == layout
    assert layout.part([]) == Layout(())
    assert layout.part([]).size == 0


@given(layouts_and_units())
def test_what_is_taken_is_the_units_one_after_another(given):
    layout, units = given
    flat = ascending(layout)
    views = layout.unit_views(flat)
    taken = layout.take(flat, units)
    assert torch.equal(taken, torch.cat([torch.empty(0), *(views[unit] for unit in layout.units if unit in units)]))
    named = layout.views(flat)
    for name, view in layout.part(units).views(taken).items():
        assert torch.equal(view, named[name])


@given(layouts_and_units())
def test_some_units_are_a_copy_and_all_of_them_the_array_itself(given):
    layout, units = given
    flat = ascending(layout)
    layout.take(flat, units).fill_(-1)
    assert torch.equal(flat, ascending(layout))
    assert layout.take(flat, None) is flat


@given(layouts_and_units())
def test_what_was_taken_is_put_back_where_it_was_and_nothing_else_changes(given):
    layout, units = given
    flat, target = ascending(layout), torch.full((layout.size,), -1.0)
    layout.put(target, units, layout.take(flat, units))
    for unit, view in layout.unit_views(target).items():
        assert torch.equal(view, flat[layout.slices[unit]] if unit in units else torch.full_like(view, -1))


@given(layouts_and_units())
def test_all_units_are_put_at_once(given):
    layout, _ = given
    target = torch.zeros(layout.size)
    layout.put(target, None, ascending(layout))
    assert torch.equal(target, ascending(layout))


@given(layouts_and_units())
def test_a_part_of_a_part_is_that_of_the_layout(given):
    layout, units = given
    assert layout.part(units).part(units[:1]) == layout.part(units[:1])
