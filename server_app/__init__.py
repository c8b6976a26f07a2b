"""What runs on the server: composing the config, running the rounds, evaluating, keeping the run folder."""
