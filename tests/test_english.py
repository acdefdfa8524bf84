"""The house rules that a program can check: docstrings are sentences, layouts the formatter's, shapes and types are said.

CONTRIBUTING.md has the rules. Every rule here is a function from a source to its violations, and must find planted ones.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trees import parsed

ROOT = Path(__file__).parents[1]
PACKAGE = [path for top in ("rlinvariant", "recipes") for path in sorted((ROOT / top).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MORE = [*TESTS, *(path for top in ("examples", "notebooks") for path in sorted((ROOT / top).rglob("*.py")))]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A function's docstring begins with one of these, in the imperative: "Return the rows ..."
IMPERATIVES = words(
    """
    Add Allow Announce Answer Append Apply Ask Assert Attend Average Await Bind Buffer Build Cache Call Cast Check Choose
    Clean Clear Close Collect Commit Compare Compile Complete Compute Connect Convert Copy Count Create Cut Decide Decode
    Delete Derive Describe Detect Disable Discard Do Draw Drop Enable Encode End Enter Escape Estimate Expect Explain Extend
    Fail Fetch Fill Find Flatten Flush Forget Format Gather Give Go Grade Guard Guess Hand Handle Hash Have Hide Hold Hook
    Ignore Import Insert Install Iterate Join Keep Kill Lay Leave Let Limit Link List Load Lock Log Look Make Map Mark Mask
    Match Measure Mend Merge Mix Move Multiply Name Normalise Note Notice Offer Open Order Pack Pad Parse Pass Patch Pick
    Pickle Plan Prepare Press Prevent Print Pull Push Put Query Queue Raise Reach Read Rebuild Receive Record Redirect
    Reduce Refuse Register Reject Release Remove Rename Render Repeat Replace Replay Report Require Reset Resolve Respond
    Restore Resume Retry Return Reuse Rotate Round Run Sample Save Say Scale Score Search See Seed Select Send Serve Set
    Shift Show Silence Sleep Sort Split Spread Start State Step Stop Store Strip Sum Summarise Swallow Swap Sync Take Tell
    Test Time Trace Track Train Translate Trim Try Tune Turn Undo Unpack Update Use Validate Vary Verify Visit Wait Warn
    Watch Work Wrap Write Yield
    """
)
# A class's docstring begins with one of these, and its subject is the class: "Holds a mean over seeds ..."
DESCRIPTIONS = words(
    """
    Adds Allows Answers Attends Builds Calls Checks Collects Compares Compiles Computes Counts Cuts Describes Draws Drives
    Embeds Ends Finds Forwards Gives Grades Guards Holds Joins Keeps Lays Leaves Limits Listens Lists Loads Locks Makes Maps
    Marks Measures Names Opens Owns Parses Prints Raises Reads Records Refuses Removes Replaces Reports Returns Runs Samples
    Saves Says Scores Sends Serves Shows Stands Starts Stops Stores Takes Tells Tracks Trains Turns Waits Watches Wraps Writes
    """
)
# A module's docstring may be a title, a noun and what belongs to it, but not a piece of a sentence
FRAGMENTS = words(
    """
    And As At Because But By For From How If In Into Of On Or Out Over So That Then Those To What When Where Whether Which While
    Whose Why With Without
    """
)
ENDS = (".", ":", "?")
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def fragments(source: str) -> Iterator[str]:
    """Yield each docstring that begins no sentence, or does not end as one."""
    for node in ast.walk(parsed(source)):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        if text is None:
            continue
        sentence = text.split("\n\n")[0]
        first = sentence.split()[0].rstrip(",;:.")
        if isinstance(node, ast.Module):
            name, good = "module", first not in FRAGMENTS
        else:
            name, good = node.name, first in (DESCRIPTIONS if isinstance(node, ast.ClassDef) else IMPERATIVES)
        if not good or not sentence.endswith(ENDS):
            yield f"{name}: {sentence}"


def pieces(source: str) -> Iterator[str]:
    """Yield each docstring of a module, class or function that begins as a piece of a sentence."""
    for node in ast.walk(parsed(source)):
        text = ast.get_docstring(node) if isinstance(node, Documented) else None
        if text and text.split()[0].rstrip(",;:.") in FRAGMENTS:
            yield f"{'module' if isinstance(node, ast.Module) else node.name}: {text.splitlines()[0]}"


def fragments_of_constants(source: str) -> Iterator[str]:
    """Yield each docstring of a constant that begins as a piece of a sentence; a title is allowed, as for a module."""
    for node in ast.walk(parsed(source)):
        body = getattr(node, "body", None)
        for named, text in zip(body[:-1], body[1:], strict=True) if isinstance(body, list) else ():
            value = text.value if isinstance(text, ast.Expr) else None
            documented = isinstance(named, ast.Assign | ast.AnnAssign) and isinstance(value, ast.Constant)
            if documented and str(value.value).split()[0].rstrip(",;:.") in FRAGMENTS:
                yield f"line {text.lineno}: {value.value}"


def test_docstrings_of_constants_are_no_pieces():
    found = [f"{path.relative_to(ROOT)} {line}" for path in PACKAGE for line in fragments_of_constants(path.read_text())]
    assert not found, f"{len(found)} docstrings:\n" + "\n".join(found)


@pytest.mark.parametrize("code", ['A = 1\n"""What A is."""', 'class C:\n    a: int = 1\n    """Of a row."""'])
def test_a_planted_fragment_of_a_constant_is_found(code):
    assert len(list(fragments_of_constants(code))) == 1
    assert not list(fragments_of_constants(code.replace("What A is", "The rows of A").replace("Of a row", "Rows, one each")))


def test_docstrings_are_sentences():
    found = [f"{path.relative_to(ROOT)} {line}" for path in PACKAGE for line in fragments(path.read_text())]
    assert not found, f"{len(found)} docstrings:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "docstring",
    [
        "Of the rows.",
        "What the rows are.",
        "The rows.",
        "Rows, ascending.",
        "Returns the rows.",  # not imperative
        "Return the rows",  # no end
        "x [rows, D], aligned.",
        "With the rows, return them.",
    ],
)
def test_a_planted_fragment_of_a_function_is_found(docstring):
    assert len(list(fragments(f'def f():\n    """{docstring}"""'))) == 1
    assert len(list(fragments(f'class C:\n    @property\n    def f(self):\n        """{docstring}"""'))) == 1


@pytest.mark.parametrize("docstring", ["What was found.", "A finding.", "Hold findings.", "Holds findings"])
def test_a_planted_fragment_of_a_class_is_found(docstring):
    assert len(list(fragments(f'class C:\n    """{docstring}"""'))) == 1


@pytest.mark.parametrize("docstring", ["What is found of rows.", "Of rows.", "From rows to columns.", "Rows"])
def test_a_planted_fragment_of_a_module_is_found(docstring):
    assert len(list(fragments(f'"""{docstring}"""'))) == 1


def test_docstrings_of_tests_are_no_pieces():
    found = [f"{path.relative_to(ROOT)} {line}" for path in TESTS for line in pieces(path.read_text())]
    assert len(TESTS) > 100 and not found, f"{len(found)} docstrings:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "piece", ["What the rows are.", "With rows, as ever.", "On a GPU: rows.", "Whether rows fit.", "As, say, rows."]
)
@pytest.mark.parametrize("code", ["{}", "class C:\n    {}", "def f():\n    {}", "class C:\n    async def f(self):\n        {}"])
def test_a_planted_piece_of_a_test_is_found(code, piece):
    assert len(list(pieces(code.format(f'"""{piece}"""')))) == 1
    assert not list(pieces(code.format(f'"""The rows: {piece}"""')))


def test_sentences_pass():
    source = (
        '"""Rows, and their bits."""\nclass C:\n    """Holds rows."""\n\n    def f(self):\n        """Return rows:\n\n    y"""'
    )
    assert not list(fragments(source))


def hand_layouts(source: str) -> Iterator[str]:
    """Yield each line that switches the formatter off."""
    for number, line in enumerate(source.splitlines(), 1):
        if re.search(r"#\s*(fmt|yapf):\s*(skip|off)", line):
            yield f"line {number}: {line.strip()}"


def test_every_layout_is_the_formatters():
    this = Path(__file__)
    found = [f"{p.relative_to(ROOT)} {x}" for p in (*PACKAGE, *MORE) if p != this for x in hand_layouts(p.read_text())]
    assert not found, "name the rows, or put one value on a line:\n" + "\n".join(found)


@pytest.mark.parametrize("line", ["x = [1,2]  # fmt: skip", "# fmt: off", "x = 1 #fmt:skip"])
def test_a_planted_layout_is_found(line):
    assert len(list(hand_layouts(f"a = 1\n{line}\n"))) == 1


def test_no_file_is_over_400_lines():
    others = [path for kind in ("*.js", "*.css", "*.c", "*.h") for path in (ROOT / "rlinvariant").rglob(kind)]
    long = {str(p.relative_to(ROOT)): n for p in (*PACKAGE, *TESTS, *others) if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"split {long}"


SUFFIX = re.compile(r"[a-z][a-z0-9_]*_(?=[A-Z0-9]*[A-Z])([A-Z0-9]+)$")


def letters_without_legend(source: str) -> Iterator[str]:
    """Yield each name whose shape suffix has a letter that the module's docstring does not explain, as in `T: tokens`."""
    tree = parsed(source)
    legend = set(re.findall(r"\b([A-Z]): ", ast.get_docstring(tree) or ""))
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} | {
        a.arg for a in ast.walk(tree) if isinstance(a, ast.arg)
    }
    for name in sorted(names):
        if (suffix := SUFFIX.match(name)) and (missing := {x for x in suffix[1] if x.isalpha()} - legend):
            yield f"{name}: no {', '.join(sorted(missing))} in the legend"


def test_shape_suffixes_have_a_legend():
    found = [f"{path.relative_to(ROOT)} {line}" for path in PACKAGE for line in letters_without_legend(path.read_text())]
    assert not found, "\n".join(found)


def test_a_planted_suffix_without_legend_is_found():
    legend = '"""Ops.\n\nT: tokens.\n"""\n'
    assert list(letters_without_legend(legend + "logits_TV = x_T")) == ["logits_TV: no V in the legend"]
    assert len(list(letters_without_legend(legend + "def f(x_R2): pass"))) == 1
    assert not list(letters_without_legend(legend + "x_T, GEMM_ROWS, on_log, x_T2, cos_ = 1, 2, 3, 4, 5"))


TENSOR_FILES = [
    *sorted((ROOT / "rlinvariant/ops").glob("*.py")),
    *sorted((ROOT / "rlinvariant/kernels").glob("*.py")),
    *(ROOT / f"rlinvariant/trainer/{name}.py" for name in ("advantages", "packing", "score")),
]


def shapes_unsaid(source: str) -> Iterator[str]:
    """Yield each public function of tensors whose docstring gives no shape, in brackets or in words, and no op that does."""
    for node in parsed(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if any("Tensor" in ast.unparse(x.annotation) for x in node.args.args if x.annotation):
            text = ast.get_docstring(node) or ""
            if not re.search(r"\[[*\w]|\bshape\b|`(ops\.)?[a-z_]+`", text):
                yield node.name


def test_public_functions_of_tensors_say_shapes():
    found = [f"{path.relative_to(ROOT)}: {name}" for path in TENSOR_FILES for name in shapes_unsaid(path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("docstring", ["", '"""Multiply x by w."""'])
def test_a_planted_function_without_shapes_is_found(docstring):
    assert list(shapes_unsaid(f"def f(x: Tensor | None, n: int):\n    {docstring or 'pass'}")) == ["f"]


def test_shapes_pass():
    assert not list(
        shapes_unsaid('def f(x: Tensor):\n    """Multiply x [*rows, K]."""\ndef _g(x: Tensor):\n    pass\ndef h(n): pass')
    )
