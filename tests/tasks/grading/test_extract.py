"""Where the answer of a response stands: tags, cues, the rest of their sentence, emphasis, Chinese and Japanese."""

# ruff: noqa: RUF001 - full-width punctuation is among the cases

import re
import time

import pytest

from dynamo_jax.tasks.grading.answers import judge
from dynamo_jax.tasks.grading.extract import extract, opens_thinking, reopened
from dynamo_jax.tasks.grading.verifier import Verifier

# One case a line: reference, verdict, response. `==` right, `!=` wrong; ⏎ is a line break.
TAGS = r"""
1/2  ==  <think>x</think><answer>\frac{1}{2}</answer>
(1,2)  ==  <think>x</think><answer>(1, 2)</answer>
x^2+1  ==  <think>x</think><answer>x^2+1</answer>
B  ==  <think>x</think><answer>B</answer>
Yes  ==  <think>x</think><answer>Yes</answer>
5  ==  <answer>\boxed{5}</answer>
5  ==  <answer>So $\boxed{5}$ it is</answer>
5  ==  <answer>$5$</answer>
5  ==  <answer>⏎\[⏎5⏎\]⏎</answer>
5  ==  <ANSWER> 5 </ANSWER>
5  ==  <answer >⏎⏎5⏎</Answer>
5  ==  <answer>**5** ✅</answer>
5  ==  <answer>x = 5</answer>
5  ==  <answer>5 apples</answer>
5  ==  <answer>The answer is 5.</answer>
5  ==  <answer>答案是5。</answer>
5  ==  <answer>5 (since 2 + 3 = 5)</answer>
120  ==  <answer>5!</answer>
B  ==  <answer>B. 12</answer>
# the last place wins, a tag or a box
5  ==  \boxed{4} <answer>5</answer>
5  ==  <answer>4</answer> or rather \boxed{5}
5  ==  <answer>4</answer> <answer>5</answer>
5  ==  <answer>5</answer> The answer is 6. I like 7.
5  ==  I put it into <answer> tags. \boxed{5}
5  ==  The tags are <answer> and so on. <answer>5</answer>
5  !=  \boxed{5} <answer>6</answer>
5  !=  <answer>5</answer> \boxed{6}
5  !=  <answer>5</answer><answer>6</answer>
# it holds one answer
5  !=  <answer>not 5</answer>
5  !=  <answer>not $5$</answer>
5  !=  <answer>3 and 5</answer>
5  !=  <answer>3 or 5</answer>
5  !=  <answer>either 5 or 6</answer>
5  !=  <answer>3, 5</answer>
5  !=  <answer>5, no wait 6</answer>
5  ==  <answer>5, not 6</answer>
6  !=  <answer>5, not 6</answer>
5  !=  <answer>5. No, 6.</answer>
5  !=  <answer>The answer is 5. Or 6.</answer>
5  !=  <answer>5 ... 7</answer>
7  !=  <answer>5 ... 7</answer>
5  !=  <answer>5⏎6</answer>
6  !=  <answer>5⏎6</answer>
5  !=  <answer>5 is wrong</answer>
5  !=  <answer>5?</answer>
5  !=  <answer>5!</answer>
5  !=  <answer>$5$; $6$</answer>
5  !=  <answer>neither 5 nor 6</answer>
5  !=  <answer>不是5</answer>
B  !=  <answer>B. Wait, C</answer>
5  !=  <answer>less than 5</answer>
5  !=  <answer>\boxed{3} and \boxed{5}</answer>
# not closed, empty, or in the reasoning: no answer
5  !=  <answer>5
5  !=  \boxed{5} <answer>6
5  !=  \boxed{5} <answer></answer>
5  !=  \boxed{5} <answer> ⏎ </answer>
5  !=  <answer>\boxed{}</answer> 5
5  !=  <answer>\boxed{5</answer>
5  !=  <think><answer>5</answer></think>
5  !=  <think><answer>5</answer>
5  !=  <think><answer>5</answer></think> \boxed{6}
5  !=  <answer>5</answer></think> It is 6.
"""
SENTENCES = r"""
42  ==  The answer is 42 because 6 * 7 = 42.
42  ==  Answer: 42 (since 40+2 = 42)
42  ==  The answer is 42, which is even.
70000  ==  The answer is $70,000 ($200,000 - $130,000).
70000  ==  The answer is \$70,000 (\$200,000 - \$130,000).
70000  ==  The answer is $70,000 ($200,000 – $130,000)
36  ==  Answer: 36 dollars ($12 x 3)
36  ==  Answer: £36 (£12 × 3).
18  ==  The answer is $18 (9 * $2).
18  ==  The answer is $18 because 9 * $2 = $18.
18  ==  Answer: $18 ($9 for each of 2 eggs)
42  ==  The answer is 42 since 40 + 2 = 42
42  ==  The answer is 42, as 6*7 = 42
42  ==  The answer is 42, so we stop after 3 steps.
42  ==  The answer is 42, where 42 = 6*7.
42  ==  The answer is 42, that is, 6 times 7.
42  ==  The answer is 42, i.e. 6 times 7.
42  ==  The answer is 42 for x = 3.
42  ==  The answer is 42 when n = 2.
42  ==  The answer is 42 if n = 2.
42  ==  The answer is 42, obtained with 6*7.
42  ==  The answer is 42 — the product of 6 and 7.
42  ==  The answer is 42 - the product of 6 and 7.
42  ==  The answer is 42; this follows from 6*7 = 42.
42  ==  The answer is 42 (6 * 7).
42  ==  The answer is $42$ because $6 \cdot 7 = 42$.
42  ==  The answer is $42$, since $40 + 2 = 42$.
42  ==  The answer is \(42\) (from \(6 \cdot 7\)).
42  ==  Answer: **42** because 6*7 = 42
1/2  ==  **Answer:** \frac{1}{2} since 2 * 1/2 = 1
5  ==  The answer is 5 apples because 2+3 = 5.
3  ==  The answer is x = 3, which is odd.
B  ==  The answer is B because 2+2 = 4.
B  ==  The answer is (B), since the others fail for n = 3.
Yes  ==  The answer is Yes, because 2 divides 4.
34  ==  Answer: The largest $n$ is 34 because 35 fails.
42  ==  Answer: There are 42 apples because 6*7 = 42.
12  ==  The answer is 12 $\text{cm}^2$.
42  ==  The value of the answer is⏎\[⏎42⏎\]
42  ==  The answer is 42. I hope it is correct.
42  ==  The answer is 42. Wait, let me check: 6*7 = 42
42  ==  The answer is 42: indeed 6 * 7 = 42.
42  ==  The answer is 42 by Vieta's formulas.
42  ==  The answer is 42 from the table, row 3.
42  ==  The answer is indeed 42.
42  ==  The answer is $42$ ($6 \times 7$).
32  ==  The answer is thirty-two, since 32 = 2^5.
1200  ==  The answer is $1,200 - the rent for 2 months.
7  ==  **Answer: 7** (because 3 + 4 = 7)
1/2  ==  The answer is $\frac{1}{2}$, or equivalently $0.5$.
1/2  ==  The answer is 1/2. Or, as a decimal, 0.5.
42  ==  The answer is $42$ to the nearest integer.
42  ==  The answer is $42$ with equality for $x = 3$.
42  ==  The answer is 42 (no other value fits).
# lists and tuples stay
1,2,3  ==  The answer is 1, 2, and 3, which are all below 4.
3,5  ==  The answer is 3, 5
3,5  ==  The answer is 3 and 5, which sum to 8.
3,5  ==  The answer is $3$ and $5$ because $3 + 5 = 8$.
(1,2)  ==  The answer is (1, 2) because x = 1 and y = 2.
3  !=  The answer is 3, 5
5  !=  The answer is 3 and 5
3  !=  The answer is $3$ and 5
5  !=  The answer is $5$ or 6
1  !=  The answer is (1, 2) because it is
B  !=  The answer is $B$; C
# so does what makes another value of it
42  !=  The answer is not 42.
42  !=  The answer is not $42$ because $42$ is even.
42  !=  The answer isn't 42.
42  !=  So it cannot be $42$.
42  !=  The answer is 42 or 43.
42  !=  The answer is less than 42.
42  !=  The answer is at most $42$.
42  !=  The answer is between $40$ and $42$.
42  !=  The answer is 42 as well as 43.
42  !=  The answer is > 42
3  !=  The answer is x < 3, where x is real.
5  !=  The answer is 5! = 120.
3  !=  The answer is 3! since 3! = 6
5  !=  The answer is 5 - 3
5  !=  The answer is 5 with remainder 2.
42  !=  The answer is 42 as well as $43$.
10  !=  The answer is 10 cm by twenty cm
5  !=  The answer is $5$ at least.
5  !=  The answer is $5$ or more.
42  !=  The answer is twice $42$.
42  !=  The answer is 42 hours 30 minutes because of that.
5  !=  The answer is 5 ... 7
2  !=  The answer is 2 (3)
42  !=  The answer is 42^2 because it is a square
42  !=  The answer is $42$ x
2  !=  The answer is f(x) = x^2
42  !=  The answer is -42, which is negative.
42  !=  Answer: 43 (since 40+2 = 42)
70000  !=  The answer is $60,000 ($200,000 - $130,000).
70000  !=  The answer is $60,000 ($200,000 - $130,000 = 70,000).
# taken back
42  !=  Answer: 42 is wrong
42  !=  Answer: $42$ is not correct.
42  !=  The answer is 42, which is wrong.
42  !=  The answer is 42, no, 43
42  !=  The answer is $42$, no, $43$
42  ==  The answer is 42, not 43.
42  !=  The answer is 42, not 42.
42  ==  The answer is 42, not 420.
42  ==  The answer is 42, not 42.5.
42  !=  The answer is $42$ (not $42$).
43  !=  The answer is 42, not 43.
42  !=  The answer is 42, not 43 but 44.
42  ==  The answer is $42$ rather than $43$.
42  !=  The answer is 42, not correct.
42  !=  The answer is 42, no 43.
42  ==  The answer is 42 (not 43).
43  !=  The answer is 42 (not 43).
B  ==  The answer is B, not C.
42  !=  The answer is 42, not 43, wait.
42  !=  The answer is 42 (or 43).
42  !=  The answer is $42$ (or $43$).
42  !=  The answer is 42, this cannot be true.
42  !=  The answer is 42 or so.
42  !=  The answer is 42, but 43 fits.
42  !=  The answer is 42 because it fits, wait, 43.
42  !=  The answer is 42, which should be 43.
42  !=  The answer is 42. No, it is 43.
42  !=  The answer is 42. Wait, 43!
42  !=  The answer is 42? Or 43?
42  !=  The answer is 42?
42  !=  The answer is 42. Oops, 43.
42  !=  The answer is 42. Correction: 43.
42  !=  The answer is 42, though 43 works.
42  !=  The answer is 42 unless n = 3.
42  !=  The answer is 42 (43 if n is odd).
42  !=  The answer is never 42.
42  !=  We get 42, because $42$ is wrong.
42  !=  The answer is 42 if n is even, 43 if n is odd.
42  !=  The answer is 42 for n = 1 and 43 for n = 2.
42  !=  The answer is 42 when n is even, otherwise 43.
"""
EMPHASIS = r"""
73  ==  **73** ✅
73  ==  __73__
73  ==  *73*
73  ==  _73_
73  ==  ***73***
73  ==  `73`
73  ==  ✅ **73**
73  ==  So we get __73__!
73  ==  **Answer:** 73
73  ==  **Answer: 73** ✅
73  ==  **Final Answer: 73**
73  ==  __Answer__: 73
73  ==  *Answer*: `73`
73  ==  The answer is **73** ✅
73  ==  Answer: 🎉 __73__ 🎉🎉
73  ==  Answer: 73 ✔️
73  ==  **The answer is $73$** ✅
73  ==  **\boxed{73}** ✅
73  ==  ✅ __$\boxed{73}$__
73  ==  Answer: <strong>73</strong> ✅
73  ==  Answer: ~~72~~ **73**
73  ==  **Answer:** **73** ✅ (verified)
x^2+1  ==  The answer is `x^2+1`.
1/2  ==  So the result is **\frac{1}{2}**
2\pi  ==  So the result is __2\pi__.
2  !=  So the result is **\frac{1}{2}**
3  !=  So x is **\frac{4}{3}** ✅
2  !=  So the result is **n^2**
42  !=  So we get **42x**
73  !=  Answer: ~~73~~ **74**
73  !=  So **73** ✅ is wrong
73  !=  **73** or **74**, the answer is **74** ✅
73  !=  Answer: **73** or **74** ✅
73  !=  The answer is **73**, no, **74**
73  !=  Answer: __not 73__
73  !=  **74** ✅
2  !=  Answer: 2**3
8  ==  Answer: 2**3
"""
EAST_ASIAN = r"""
42  ==  答案是42。
42  ==  答案为42
42  ==  所以一共有42个苹果。
42  ==  答えは42です。
42  ==  答案：42
42  ==  答案是：$42$
1/2  ==  最终答案为 \frac{1}{2}
1/2  ==  所以答案应为 $\frac{1}{2}$。
42  ==  答え：42
42  ==  正解は42
42  ==  答えは 42 である。
42  ==  よって全部で42個になります。
B  ==  故选B
B  ==  故选：（B）。
B  ==  因此选择 B
B  ==  正确答案选 B。
42  ==  答案是４２。
42  ==  **答案：42**
42  ==  【答案】42
42  ==  答：小明一共有42个苹果。
42  ==  答案是42，因为6*7=42。
42  ==  答案是42（因为6*7=42）。
42  ==  答案是**42**平方厘米。
42  ==  答案等于42，其中42=6*7。
42  ==  答えは「42」です。
42  ==  故答案为：42．
B  ==  所以选择B选项。
1/2  ==  答案是$\frac{1}{2}$，即0.5。
3,5  ==  答案是3和5。
3,5  ==  答案是 x=3 或 x=5。
3,5  ==  $\boxed{3}$和$\boxed{5}$
(1,2)  ==  答案是（1，2）。
42  !=  答案是43，因为42太小。
42  !=  答案是-42。
42  !=  答案不是42。
42  !=  所以不是42。
42  !=  答案是42万。
42  !=  所以一共有42万个苹果。
42  !=  答案是42或43。
3  !=  答案是3和5。
42  !=  答案是42，不，是43。
42  !=  答案是42，不对，应该是43。
42  !=  答案是42以上。
42  !=  答案是至少42。
42  !=  答案是42的平方。
42  !=  答えは42ではない。
42  !=  答えは42より大きい。
42  !=  答えは42または43です。
42  !=  答案是42小时30分钟。
42  !=  答案是42。不，是43。
42  !=  答案可能是42。
42  !=  答案在40和42之间。
42  !=  答案是负42。
2  !=  答案是三分之2。
B  !=  答案选A，不选B
42  !=  答えは42か43です。
42  !=  答えは43です。
B  !=  故选A
B  !=  故选AB
"""


def rows(table: str) -> list[list[str]]:
    lines = [line for line in table.replace("⏎", "\x00").splitlines() if line and line[0] != "#"]
    return [re.split("  (==|!=)  ", line.replace("\x00", "\n"), maxsplit=1) for line in lines]


@pytest.mark.parametrize(("gold", "verdict", "output"), rows(TAGS + SENTENCES + EMPHASIS + EAST_ASIAN))
def test_the_place_of_the_answer(gold: str, verdict: str, output: str) -> None:
    assert judge(output, gold) is (verdict == "==")


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("<answer>\n x + 1 \n</answer>", "x + 1"),
        ("<answer></answer> The answer is 5", None),
        ("The answer is 42 million because of that.", "42 million"),  # what it is worth is not decided here
        ("Together they have 42 million apples.", "42 million"),
        ("The answer is $42$ thousand.", "$42$ thousand"),
        ("The answer is $5$ meters.", "5"),
        ("The answer is no solution.", "no solution"),
        ("Answer: the line from A to B", "the line from A to B"),
        ("The roots are $a_1$ and $__b__$", "__b__"),
        ("Answer: x, sin x", "x, sin x"),
        ("The answer is AB = 3, BC = 4", "AB = 3, BC = 4"),
        ("It costs $5 and $x = 3$ holds", "x = 3"),
        ("The answer is sqrt 42", "sqrt 42"),
        ("Its length is 42cm.", "42cm"),
        ("So n=42, as claimed", "42"),
        ("所以x=\\frac{4}{3}。", "x=\\frac{4}{3}。"),
        ("Answer: ② ✅", "②"),
        ("答案是42亿人。", "42亿"),
        ("答案是42万以上。", "42万以上"),
        ("所以一共有42万多人。", "42万多"),
        ("答案是3千2百。", "3千2百"),
        ("It takes 5 hundred thousand years.", "5 hundred thousand"),
    ],
)
def test_the_text_of_the_answer(output: str, answer: str | None) -> None:
    assert extract(output) == answer


@pytest.mark.parametrize(
    "text",
    ["<answer>", "<answer>1</answer>", "**a", "*a* ", "`a", "__a", "答案是4和", "选A", "(1 ", "1 (a b) ",
     "42, because ", "1 " + " " * 999, "it is not ", "should be ", "no, ", "1 -- ", "if 1 and ", "$5 ($",
     "Answer: the $n$ is ", "✅"],
)  # fmt: skip
def test_the_search_is_linear(text: str) -> None:
    output = text * (200_000 // len(text))
    start = time.process_time()
    for response in (output, f"The answer is 42{output}", f"Answer: the $n$ is {output}", f"<answer>{output}</answer>"):
        extract(response)
    assert time.process_time() - start < 3.0


# --- a prompt that ends inside an open <think>


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|user|>1+1=?<|assistant|>\n<think>\n", True),
        ("1+1=?\nAssistant: <think>", True),
        ("1+1=?<｜Assistant｜><think>\nOkay, let me see.", True),
        ("<think>old</think> 2. 1+1=? <think>\n", True),
        ("<|user|>1+1=?<|assistant|>\n<think>\n\n</think>\n\n", False),  # thinking is switched off
        ("<|user|>Begin with <think>, then answer. 1+1=?<|assistant|>\n", False),
        ("Reason between <think> and </think>. 1+1=?", False),
        ("[INST]Begin with <think>\n1+1=?[/INST]", False),
        ("1+1=?", False),
        ("", False),
    ],
)
def test_prompts_that_open_thinking(prompt: str, opened: bool) -> None:
    assert opens_thinking(prompt) is opened


def test_a_response_with_its_opening() -> None:
    assert extract(reopened("maybe \\boxed{5}? wait")) is None
    assert extract(reopened("so 5</think>\\boxed{5}")) == "5"
    assert reopened("\n<think>a</think>\\boxed{5}") == "\n<think>a</think>\\boxed{5}"  # it writes the opening once more


def test_a_tag_that_needs_algebra() -> None:
    with Verifier(workers=1) as verifier:
        outputs = [
            "<answer>1 + x^2</answer>",
            "答案是$1+x^2$。",
            "<answer>x^2</answer>",
            "The answer is $1+x^2$, which is even.",
            "<answer>not x^2+1</answer>",
        ]
        assert verifier.grade_batch([(output, "x^2+1") for output in outputs]) == [True, True, False, True, False]
