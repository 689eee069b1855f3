"""subspec-bench from its first moment: signals are handled before anything is imported."""

from subspec.artifacts.common.signals import end_at_once


def main() -> None:
    end_at_once()
    from subspec.runtime.bench.cli import main as command

    command()


if __name__ == "__main__":
    main()
