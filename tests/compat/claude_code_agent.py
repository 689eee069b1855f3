"""Claude Code against a running server: `claude_code_agent.py BASE_URL --program P --python P`.

A real model answers in text, counts tokens, and gets a prompt that is too long; one that is told
to leads Claude Code through a command and its result.
"""

from typing import Any

from agents import SAID, Agent, events_in, read_agent, run, told_to_call

BRIEF = ("--tools", "Bash", "--system-prompt", "Be brief.")
STREAM = ("--output-format", "stream-json", "--verbose")


def claude(agent: Agent, base_url: str, *arguments: str) -> str:
    return run(
        [agent.program, "-p", *arguments],
        ANTHROPIC_BASE_URL=base_url,
        ANTHROPIC_API_KEY="none",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )


def result_in(printed: str) -> dict[str, Any]:
    last = events_in(printed)[-1]
    assert last["type"] == "result", printed
    return last


def main() -> None:
    agent = read_agent(__doc__)
    result = result_in(claude(agent, agent.base_url, *BRIEF, *STREAM, "Say hello."))
    assert result["subtype"] == "success" and result["result"], result
    assert result["usage"]["output_tokens"] > 0, result

    found = claude(agent, agent.base_url, *BRIEF, "--model", agent.model_id, "Say hello.")
    assert "issue with the selected model" not in found, found

    found = claude(agent, agent.base_url, "/context")
    assert "System tools" in found, found

    found = claude(agent, agent.base_url, "Say hello.")
    assert "Prompt is too long" in found, found

    call = {"command": "echo forty-$((40 + 2))", "description": "Say it"}
    with told_to_call(agent, "Bash", call) as base_url:
        found = claude(agent, base_url, "--allowedTools", "Bash", *STREAM, "What does it say?")
    assert '"stdout":"forty-42"' in found, found
    assert result_in(found)["result"] == SAID, found


if __name__ == "__main__":
    main()
