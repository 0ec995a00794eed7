//! The table of the bundled model's card, measured again: greedy exact match on the cases of
//! `tests/fixtures/evaluation`.
//!
//! A plain run takes a seeded sample of every row and compares the answers with those of the reference (mlx-lm in f32).
//! `OMLX_EVALUATION=full` takes all cases and compares the score of every row with the card's figure.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mlx_rs::Dtype;
use omlx::engine::{Event, Request, RequestState};
use omlx::kernels::Precision;
use omlx::mlx::Device;
use omlx::pool::{EnginePool, PoolOptions};
use serde::Deserialize;
use serde_json::{Value, json};

/// A hung engine fails the test instead of the CI's clock.
const PATIENCE: Option<Duration> = Some(Duration::from_secs(300));
/// Points that a row of all cases may stay below the card's figure.
const TOLERANCE: f64 = 1.0;
/// Answers of a sample, over all rows, that may differ from the reference: two logits can be nearly equal.
const MAX_DIFFERING: usize = 1;
const MAX_TOKENS: usize = 160;
const SEED: u64 = 777;

/// A row of the card's table.
struct Row {
    /// Name of the case file.
    name: &'static str,
    /// Its label in the card.
    label: &'static str,
    cases: usize,
    /// Cases in a sample: few of the long prompts.
    sample: usize,
}

const ROWS: [Row; 9] = [
    Row { name: "recall-5", label: "recall, 5 facts", cases: 100, sample: 6 },
    Row { name: "recall-500", label: "recall, about 500 tokens", cases: 100, sample: 4 },
    Row { name: "recall-1500", label: "recall, about 1500 tokens", cases: 100, sample: 2 },
    Row { name: "recall-3000", label: "recall, about 3000 tokens", cases: 50, sample: 1 },
    Row { name: "tools", label: "tool calls and answers from tool results", cases: 100, sample: 6 },
    Row { name: "json", label: "JSON extraction", cases: 100, sample: 6 },
    Row { name: "sums", label: "sums", cases: 100, sample: 6 },
    Row { name: "strings", label: "string work", cases: 100, sample: 6 },
    Row { name: "facts", label: "simple facts", cases: 100, sample: 6 },
];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    prompt: String,
    expected: String,
    /// The reference's answer where it is not the expected one.
    reference: Option<String>,
    /// The smallest distance of the two largest logits on the reference's way.
    margin: f32,
}

impl Case {
    fn reference(&self) -> &str {
        self.reference.as_deref().unwrap_or(&self.expected)
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Selection {
    All,
    Sample,
}

impl Selection {
    fn from_environment() -> Self {
        match std::env::var("OMLX_EVALUATION").as_deref() {
            Ok("full") => Self::All,
            Err(std::env::VarError::NotPresent) => Self::Sample,
            other => panic!("OMLX_EVALUATION is {other:?}; \"full\" takes all cases, unset a sample"),
        }
    }

    fn cases(self, row: &Row) -> Vec<Case> {
        let text =
            std::fs::read_to_string(root().join(format!("tests/fixtures/evaluation/{}.jsonl", row.name))).unwrap();
        let mut cases: Vec<Case> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(cases.len(), row.cases, "{}", row.name);
        if self == Self::Sample {
            shuffle(&mut cases);
            cases.truncate(row.sample);
        }
        cases
    }
}

/// Fisher and Yates with SplitMix64.
fn shuffle<T>(items: &mut [T]) {
    let mut state = SEED;
    for end in (1..items.len()).rev() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        items.swap(end, ((z ^ (z >> 31)) % (end as u64 + 1)) as usize);
    }
}

/// How the model did on a row.
struct Outcome {
    row: &'static Row,
    cases: usize,
    right: usize,
    /// Answers that are not the reference's.
    differing: Vec<String>,
}

impl Outcome {
    fn percent(&self) -> f64 {
        100.0 * self.right as f64 / self.cases as f64
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The figures of the card, by label.
fn card() -> HashMap<String, f64> {
    let text = std::fs::read_to_string(root().join("models/tiny-chat/README.md")).unwrap();
    let cells = text.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |")?.split_once(" | "));
    cells.filter_map(|(label, figure)| Some((label.to_owned(), figure.parse().ok()?))).collect()
}

/// The ways to compute that must hold the card's figures. A new option of the pool gets its entries here.
fn settings() -> Vec<(&'static str, PoolOptions)> {
    let options = |precision, dtype| {
        let models_dir = Some(root().join("models"));
        // All cases of a row wait at once.
        let queue_length = Some(1000);
        PoolOptions { models_dir, device: Some(Device::Cpu), precision, dtype, queue_length, ..Default::default() }
    };
    vec![("exact", options(Precision::Exact, Some(Dtype::Float32))), ("fast", options(Precision::Fast, None))]
}

/// Undamaged prompts.
fn as_it_is(_: &EnginePool, prompt: &str) -> Value {
    prompt.into()
}

/// Asks for every answer before it reads the first: an engine that computes several at a time shall do so.
fn answers(pool: &EnginePool, prompts: impl Iterator<Item = Value>) -> Vec<String> {
    let requests: Vec<Arc<RequestState>> = prompts
        .map(|prompt| {
            let object = json!({ "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0 });
            pool.generate(Request::from_json(object.to_string().as_bytes(), false).unwrap()).unwrap()
        })
        .collect();
    requests.iter().map(|request| answer(request)).collect()
}

fn answer(request: &RequestState) -> String {
    let mut text = String::new();
    loop {
        match request.next(PATIENCE).expect("an event") {
            Event::Delta(delta) => text.push_str(&delta.text),
            Event::Loading(..)
            | Event::Started(..)
            | Event::ChoiceDone(..)
            | Event::Embeddings(_)
            | Event::Scores(_) => {}
            Event::Done(done) => {
                assert_eq!(done.error, None);
                return text.trim().to_owned();
            }
        }
    }
}

/// Runs the model over `rows`. `prompt` is what it gets to read of a case's prompt.
fn evaluate(
    options: PoolOptions,
    selection: Selection,
    rows: impl Iterator<Item = &'static Row>,
    prompt: fn(&EnginePool, &str) -> Value,
) -> Vec<Outcome> {
    let pool = EnginePool::open(options).unwrap();
    let outcome = |row| {
        let cases = selection.cases(row);
        let given = answers(&pool, cases.iter().map(|case| prompt(&pool, &case.prompt)));
        let pairs = || given.iter().zip(&cases);
        let differing = pairs().filter(|(answer, case)| *answer != case.reference());
        Outcome {
            row,
            cases: cases.len(),
            right: pairs().filter(|(answer, case)| **answer == case.expected).count(),
            differing: differing
                .map(|(answer, case)| {
                    format!("{}: {answer:?}, not {:?} (margin {})", row.name, case.reference(), case.margin)
                })
                .collect(),
        }
    };
    let outcomes = rows.map(outcome).collect();
    pool.close();
    outcomes
}

/// What is wrong with `outcomes`, if anything.
fn verdict(outcomes: &[Outcome], selection: Selection, card: &HashMap<String, f64>) -> Result<(), String> {
    let complaints: Vec<String> = match selection {
        Selection::All => {
            let low = outcomes.iter().filter(|outcome| outcome.percent() < card[outcome.row.label] - TOLERANCE);
            low.map(|low| format!("{}: {:.1} %, the card says {}", low.row.name, low.percent(), card[low.row.label]))
                .collect()
        }
        Selection::Sample => {
            let differing: Vec<String> = outcomes.iter().flat_map(|outcome| outcome.differing.clone()).collect();
            if differing.len() > MAX_DIFFERING { differing } else { Vec::new() }
        }
    };
    if complaints.is_empty() { Ok(()) } else { Err(complaints.join("\n")) }
}

fn print_table(title: &str, outcomes: &[Outcome], card: &HashMap<String, f64>) {
    println!("{title:42} cases  as reference      %   card");
    for outcome in outcomes {
        let Outcome { row, cases, differing, .. } = outcome;
        let same = cases - differing.len();
        println!("{:42} {cases:5} {same:13} {:6.1} {:6}", row.label, outcome.percent(), card[row.label]);
    }
    for line in outcomes.iter().flat_map(|outcome| &outcome.differing) {
        println!("{line}");
    }
}

#[test]
fn the_model_is_as_good_as_its_card_says() {
    let (selection, card) = (Selection::from_environment(), card());
    assert_eq!(card.len(), ROWS.len(), "rows of the card");
    for (name, options) in settings() {
        let outcomes = evaluate(options, selection, ROWS.iter(), as_it_is);
        print_table(name, &outcomes, &card);
        verdict(&outcomes, selection, &card).unwrap_or_else(|complaints| panic!("{name}:\n{complaints}"));
    }
}

#[test]
fn a_model_that_reads_something_else_fails() {
    /// The tokens of the conversation backwards, then the mark of the answer as it is.
    fn backwards(pool: &EnginePool, prompt: &str) -> Value {
        let (conversation, mark) = prompt.split_at(prompt.rfind("<|im_start|>assistant").unwrap());
        let mut ids = pool.tokenize(None, conversation, false).unwrap();
        ids.reverse();
        ids.extend(pool.tokenize(None, mark, false).unwrap());
        ids.into()
    }
    let card = card();
    let short = || ROWS.iter().filter(|row| row.sample > 4);
    for (name, options) in settings() {
        let outcomes = evaluate(options, Selection::Sample, short(), backwards);
        for outcome in outcomes {
            println!("{name}, {}: {} of {} right", outcome.row.name, outcome.right, outcome.cases);
            assert!(outcome.percent() < 20.0, "{name}, {}: {} %", outcome.row.name, outcome.percent());
            let outcome = [outcome];
            assert!(verdict(&outcome, Selection::Sample, &card).is_err());
            assert!(verdict(&outcome, Selection::All, &card).is_err());
        }
    }
}

#[test]
fn the_bounds_lie_where_they_should() {
    let row = ROWS.iter().find(|row| row.cases == 100).unwrap();
    let card = HashMap::from([(row.label.to_owned(), 97.0)]);
    let holds = |right, differing, selection| {
        let differing = vec!["another answer".to_owned(); differing];
        verdict(&[Outcome { row, cases: row.cases, right, differing }], selection, &card).is_ok()
    };
    assert!(holds(96, 4, Selection::All) && !holds(95, 0, Selection::All));
    assert!(holds(95, 1, Selection::Sample) && !holds(100, 2, Selection::Sample));
}
