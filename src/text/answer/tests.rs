mod cases;
mod detect;
mod random;

use serde_json::{Value, json};

use super::*;

/// The tools of the tests: arguments of all kinds.
fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {
            "city": {"type": "string"}, "days": {"type": "integer"}, "units": {"type": "array"}}}}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ])
}

fn format(tools: ToolFormat) -> AnswerFormat {
    let template = match tools {
        ToolFormat::Harmony => "<|channel|><|message|>",
        ToolFormat::Mistral | ToolFormat::MistralArray => "[THINK]",
        ToolFormat::Gemma => "<|channel>thought",
        ToolFormat::Seed => "<seed:think>",
        _ => "<think>",
    };
    AnswerFormat { tools: Some(tools), ..AnswerFormat::detect(template, |_| false) }
}

/// An answer put together again.
#[derive(Debug, Default, Clone, PartialEq)]
struct Answer {
    content: String,
    reasoning: String,
    /// Name and arguments.
    calls: Vec<(String, String)>,
    ids: Vec<String>,
    complete: usize,
}

impl Answer {
    fn add(&mut self, parts: Vec<AnswerPart>) {
        for part in parts {
            match part {
                AnswerPart::Content(text) => self.content += &text,
                AnswerPart::Reasoning(text) => self.reasoning += &text,
                AnswerPart::Call { index, id, name, arguments } => {
                    if index == self.calls.len() {
                        self.calls.push((name.clone(), String::new()));
                        self.ids.push(id.clone());
                    }
                    assert_eq!((index + 1, &self.calls[index].0, &self.ids[index]), (self.calls.len(), &name, &id));
                    self.calls[index].1 += &arguments;
                }
            }
        }
    }

    fn calls(&self) -> Vec<(&str, &str)> {
        self.calls.iter().map(|(name, arguments)| (name.as_str(), arguments.as_str())).collect()
    }
}

/// Reads an answer in these pieces.
fn read<'a>(settings: &AnswerSettings, pieces: impl IntoIterator<Item = &'a str>) -> Answer {
    let (mut parser, mut answer) = (settings.parser(7), Answer::default());
    for piece in pieces {
        answer.add(parser.push(piece));
    }
    answer.add(parser.finish());
    answer.complete = parser.complete_calls();
    answer
}

fn settings(tools_format: ToolFormat) -> AnswerSettings {
    AnswerSettings::new(format(tools_format), Some(&tools()), "")
}

/// Reads an answer as a whole, and checks that characters one by one give the same.
fn parse(tools_format: ToolFormat, text: &str) -> Answer {
    let settings = settings(tools_format);
    let whole = read(&settings, [text]);
    assert_eq!(read(&settings, text.split_inclusive(|_| true)), whole, "{tools_format:?}: {text}");
    whole
}
