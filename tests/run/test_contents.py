"""What a checkpoint holds."""

from dynamo_jax.run.contents import Contents


def test_what_goes_in_comes_out() -> None:
    contents = Contents("train", "history", {"next_batch": 3}, ["a", "b"], {"reward/mean": 0.5})
    assert Contents.load_state(*contents.state()) == contents


def test_an_older_checkpoint_has_its_line_written_and_knows_no_held_out_prompts() -> None:
    old = Contents.load_state({"train": 1, "stats": 2}, {"data": {"next_batch": 3}, "best": 0.7})
    assert old == Contents(1, 2, {"next_batch": 3}, evals=None, line=None)
