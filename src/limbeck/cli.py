"""The command line (placeholder until the verbs land)."""


def main() -> None:
    """Print the name."""
    print("limbeck")
