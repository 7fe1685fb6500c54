"""Entries and questions in, the page of the documentation that says what is asked of which program out."""

HEAD = """\
What is tested of which program
===============================

.. Written by ``python tests/test_contract.py > docs/contract.rst``; a test compares it with the tests that there are.

Each of these {number} programs is an ordinary NumPyro program, in ``tests/contract/``, and each mark is a test that
``python -m pytest tests/test_contract.py -m "slow or not slow"`` runs. The questions:

{questions}

A dash in the column *evidence* says that there is no exact answer to compare with; any other dash is a known defect. Where
discrete states are summed exactly, *vanilla* is the density alone, since NumPyro's ``Trace_ELBO`` needs draws with a gradient.
"""


def page(fields, questions, asked):
    """`fields`: entries by title. `questions`: functions by name. `asked(entry)`: the names of the questions that are run."""
    lines = [f"*{name}*\n   {question.__doc__.splitlines()[0]}" for name, question in questions.items()]
    number = sum(map(len, fields.values()))
    parts = [HEAD.format(number=number, questions="\n\n".join(lines))]
    for title, entries in fields.items():
        rows = [("Program", *questions)]
        for entry in entries:
            of_entry = asked(entry)
            rows.append((entry.about, *("✓" if name in of_entry else "-" for name in questions)))
        widths = " ".join(["37", *["7"] * len(questions)])
        table = [f".. list-table:: {title}", "   :header-rows: 1", f"   :widths: {widths}", ""]
        for first, *others in rows:
            table += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        parts.append("\n".join(table) + "\n")
    return "\n".join(parts)
