//! Chat templates against transformers: every case of `tests/fixtures/templates/*.json` byte for byte, and of the file
//! that `OMLX_TEMPLATE_FIXTURES` names (`make_templates.py --compare`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use omlx::error::Status;
use omlx::text::{ChatInput, ChatTemplates, LocalTime, SpecialTokens, TextModel};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Fixture {
    /// Template sources by name, or else a model folder.
    templates: Option<BTreeMap<String, String>>,
    folder: Option<PathBuf>,
    special_tokens: BTreeMap<String, String>,
    chats: Map<String, Value>,
    tools: Map<String, Value>,
    /// Variables of all cases.
    #[serde(default)]
    kwargs: Map<String, Value>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    chat: String,
    add_generation_prompt: bool,
    tools: Option<String>,
    template: Option<String>,
    #[serde(default)]
    kwargs: Map<String, Value>,
    /// What transformers rendered ..
    expected: Option<String>,
    /// .. or the error that it raised, as `Type: message`.
    error: Option<String>,
}

/// The moment that the fixtures were made for.
fn fixed_clock() -> LocalTime {
    LocalTime { year: 2024, month: 7, day: 4, hour: 15, minute: 5, second: 9 }
}

fn load(fixture: &Fixture) -> Box<dyn AsRef<ChatTemplates>> {
    struct Owned(ChatTemplates);
    struct Folder(TextModel);
    impl AsRef<ChatTemplates> for Owned {
        fn as_ref(&self) -> &ChatTemplates {
            &self.0
        }
    }
    impl AsRef<ChatTemplates> for Folder {
        fn as_ref(&self) -> &ChatTemplates {
            self.0.templates()
        }
    }
    if let Some(folder) = &fixture.folder {
        let model =
            TextModel::load_with_clock(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), fixed_clock).unwrap();
        let tokens = model.special_tokens();
        for (name, text) in &fixture.special_tokens {
            assert_eq!(tokens.get(name), Some(text.as_str()), "{name} of {}", folder.display());
        }
        return Box::new(Folder(model));
    }
    let special: SpecialTokens = fixture.special_tokens.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    Box::new(Owned(ChatTemplates::new(fixture.templates.clone().unwrap(), special, fixed_clock).unwrap()))
}

/// Renders one case; `Err` describes how the outcome differs from the fixture's.
fn check(templates: &ChatTemplates, fixture: &Fixture, case: &Case) -> Result<(), String> {
    let mut kwargs = fixture.kwargs.clone();
    kwargs.extend(case.kwargs.clone());
    let input = ChatInput {
        messages: &fixture.chats[&case.chat],
        tools: case.tools.as_ref().map(|name| &fixture.tools[name]),
        add_generation_prompt: case.add_generation_prompt,
        template: case.template.as_deref(),
        kwargs: Some(&kwargs),
    };
    match (templates.render(&input), &case.expected, &case.error) {
        (Ok(text), Some(expected), None) if text == *expected => Ok(()),
        (Err(e), None, Some(error)) if e.status() == Status::Template => match error.strip_prefix("TemplateError: ") {
            Some(raised) if !e.message().ends_with(raised) => Err(format!("raised {error:?}, here {:?}", e.message())),
            _ => Ok(()),
        },
        (outcome, expected, error) => Err(format!("expected {expected:?} {error:?}\n     got {outcome:?}")),
    }
}

/// All differences of a fixture, each with the place of its case.
fn differences(fixture: &Fixture) -> Vec<String> {
    let templates = load(fixture);
    let outcome = |(index, case): (usize, &Case)| {
        let place = format!("case {index} (chat {}, tools {:?}, template {:?})", case.chat, case.tools, case.template);
        check((*templates).as_ref(), fixture, case).err().map(|difference| format!("{place}: {difference}"))
    };
    fixture.cases.iter().enumerate().filter_map(outcome).collect()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn fixture(name: &str) -> Fixture {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/templates");
    serde_json::from_str(&read(&folder.join(format!("{name}.json")))).unwrap()
}

fn assert_parity(name: &str, at_least: usize) {
    let fixture = fixture(name);
    assert!(fixture.cases.len() >= at_least, "{name}: only {} cases", fixture.cases.len());
    let differences = differences(&fixture);
    assert!(differences.is_empty(), "{name}: {} differ\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn qwen3_style() {
    assert_parity("qwen3", 100);
}

#[test]
fn llama3_style() {
    assert_parity("llama3", 100);
}

#[test]
fn qwen2_5_style() {
    assert_parity("qwen2.5", 50);
}

#[test]
fn mistral_style() {
    assert_parity("mistral", 50);
}

#[test]
fn bundled_model() {
    assert_parity("tiny-chat", 100);
}

#[test]
fn expressions() {
    assert_parity("expressions", 60);
}

#[test]
fn choice_among_named_templates() {
    assert_parity("named", 5);
}

#[test]
fn files_named_by_the_environment() {
    // Without the variable there is nothing to add to the committed fixtures.
    let Some(path) = std::env::var_os("OMLX_TEMPLATE_FIXTURES") else { return };
    let fixtures: Vec<Fixture> = serde_json::from_str(&read(Path::new(&path))).unwrap();
    assert!(!fixtures.is_empty());
    let place = |fixture: &Fixture| fixture.folder.as_ref().map(|f| f.display().to_string()).unwrap_or_default();
    let all = fixtures.iter().flat_map(|f| differences(f).into_iter().map(move |d| format!("{}: {d}", place(f))));
    let all: Vec<String> = all.collect();
    assert!(all.is_empty(), "{} differ\n{}", all.len(), all.join("\n"));
}

/// The comparison must notice one changed byte, a missing error and a wrong message.
#[test]
fn altered_expectations_are_reported() {
    let mut altered = fixture("mistral");
    let good = altered.cases.iter().position(|case| case.expected.is_some()).unwrap();
    altered.cases[good].expected.as_mut().unwrap().push(' ');
    let mut raising =
        altered.cases.iter_mut().filter(|case| case.error.as_ref().is_some_and(|e| e.starts_with("TemplateE")));
    raising.next().unwrap().error.as_mut().unwrap().push('!');
    let case = raising.next().unwrap();
    (case.expected, case.error) = (Some(String::new()), None);
    assert_eq!(differences(&altered).len(), 3);
}
