"""The tables of docs/features.md, docs/models.md and docs/versions.md, made from the tests themselves.

A test that shows that something works carries `@pytest.mark.feature("row")` or
`@pytest.mark.model("row")`. One that shows that something is refused says with which sentence,
`refused="..."`, and one that shows what stock vLLM cannot do here says stock's error,
`stock_fails="..."`; both hand what they caught to the fixture `said`, which looks for that sentence.
There is no other list, but for rows that wait for a GPU (`gpu.py`).

Every test session notes how its tests ended (`record.py`), for each version of vLLM apart, below
`.test-results`, which git ignores. `make tables` takes the last outcomes of the tests that carry rows
into docs/results.json and writes the tables.
"""
