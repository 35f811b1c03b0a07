"""What a checkpoint holds."""

from dynamo_jax.run.contents import Contents, Form, forms


def test_what_goes_in_comes_out() -> None:
    contents = Contents("train", "history", {"next_batch": 3}, ["a", "b"], {"reward/mean": 0.5})
    assert Contents.load_state(*contents.state()) == contents


def test_an_older_checkpoint_has_its_line_written_and_knows_no_held_out_prompts() -> None:
    old = Contents.load_state({"train": 1, "stats": 2}, {"data": {"next_batch": 3}, "best": 0.7})
    assert old == Contents(1, 2, {"next_batch": 3}, evals=None, line=None)


def test_a_state_has_every_combination_of_its_parts_forms_and_todays_first() -> None:
    train = [Form("new"), Form("old", lambda x: f"new of {x}")]
    history = [Form(1), Form(2, lambda x: x * 10)]
    found = forms(train, history)
    assert [form.arrays for form in found] == [{"train": t, "stats": h} for t in ("new", "old") for h in (1, 2)]
    assert found[0].upgrade({"train": "a", "stats": 5}) == {"train": "a", "stats": 5}
    assert found[3].upgrade({"train": "a", "stats": 5}) == {"train": "new of a", "stats": 50}
