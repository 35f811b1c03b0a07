"""`python -m dynamo_jax`: the same as the console script `dynamo-jax`."""

from dynamo_jax.cli import main

raise SystemExit(main())
