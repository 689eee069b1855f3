"""smolagents' agents against a running server: `smolagents_agent.py BASE_URL`.

A small model solves nothing. What is checked is that the agent's requests are understood, that it
can run the calls it gets, and that a tool of its is called.
"""

import argparse
import json
import urllib.request
from importlib.metadata import version
from typing import Any

from smolagents import CodeAgent, OpenAIModel, Tool, ToolCallingAgent


class Weather(Tool):  # type: ignore[misc]
    name = "get_weather"
    description = "The weather of a city."
    inputs: Any = {"city": {"type": "string", "description": "city", "enum": ["Paris", "Oslo"]}}
    output_type = "string"

    def __init__(self) -> None:
        super().__init__()
        self.cities: list[str] = []

    def forward(self, city: str) -> str:
        self.cities.append(city)
        return f"sunny in {city}"


def check_tool_calling_agent(model: OpenAIModel, stream: bool) -> None:
    """Every step is a call, as the agent demands one. A small model may give one arguments that the
    tool has not, which its schema does not forbid: smolagents does not run that call."""
    weather = Weather()
    agent = ToolCallingAgent(tools=[weather], model=model, max_steps=3, stream_outputs=stream)
    task = "Call get_weather for Paris, then give the final answer."
    result = agent.run(task, return_full_result=True)
    calls = [call for step in result.steps for call in step.get("tool_calls") or []]
    names = {call["function"]["name"] for call in calls}
    errors = [step["error"] for step in result.steps if step.get("error")]
    not_run = [one for one in errors if "is not in the tool's input schema" in str(one)]
    assert (calls or not_run) and names <= {"get_weather", "final_answer"}, (calls, errors)
    assert not any("parsing" in str(one) or "Error code" in str(one) for one in errors), errors
    print(f"  calls: {[call['function'] for call in calls]}, weather of {weather.cities}")
    assert result.token_usage.output_tokens > 0


def check_code_agent(model: OpenAIModel) -> None:
    """Steps with stop texts and, here, code in a form that a grammar forces."""
    agent = CodeAgent(
        tools=[Weather()], model=model, max_steps=1, use_structured_outputs_internally=True
    )
    result = agent.run("What is the weather in Paris?", return_full_result=True)
    errors = [step["error"] for step in result.steps if step.get("error")]
    assert not any("Error code" in str(one) for one in errors), errors
    assert result.token_usage.output_tokens > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base_url", help="as in http://127.0.0.1:8000")
    options = parser.parse_args()
    base_url = options.base_url.rstrip("/") + "/v1"
    with urllib.request.urlopen(f"{base_url}/models") as response:
        model_id = json.load(response)["data"][0]["id"]
    model = OpenAIModel(model_id, api_base=base_url, api_key="none", max_tokens=192)
    name = f"smolagents {version('smolagents')}"
    for stream in (False, True):
        check_tool_calling_agent(model, stream)
        print(f"{name}: check_tool_calling_agent, streamed: {stream}", flush=True)
    check_code_agent(model)
    print(f"{name}: check_code_agent", flush=True)


if __name__ == "__main__":
    main()
