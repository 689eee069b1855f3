"""Entry point of subspec-plan; signals are handled before anything else is imported."""

from subspec.artifacts.common.signals import end_at_once


def main() -> None:
    end_at_once()
    from subspec.planner.cli import main as command

    command()


if __name__ == "__main__":
    main()
