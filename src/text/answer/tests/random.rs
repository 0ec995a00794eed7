use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::*;

/// What texts are made of: the marks of the format, pieces of its example, JSON, and characters that parsers care about.
fn fragments(format: ToolFormat) -> BoxedStrategy<String> {
    let example = super::cases::example(format);
    let mut marks: Vec<String> = super::format(format).marks(true).map(str::to_owned).collect();
    let syntax = format.syntax();
    let parts =
        [syntax.open, syntax.before_name, syntax.after_name, syntax.after_arguments, syntax.between, syntax.close];
    marks.extend(parts.iter().filter(|part| !part.is_empty()).map(|part| part.to_string()));
    if let Arguments::Tagged { before_key, after_key, after_value, .. } = syntax.arguments {
        marks.extend([before_key, after_key, after_value].map(str::to_owned));
    }
    marks.push(example.to_owned());
    let piece = (any::<Index>(), any::<Index>()).prop_map(move |(from, to)| {
        let ends: Vec<usize> = example.char_indices().map(|(at, _)| at).chain([example.len()]).collect();
        let (from, to) = (*from.get(&ends), *to.get(&ends));
        example[from.min(to)..from.max(to)].to_owned()
    });
    let start = any::<Index>().prop_map(move |to| {
        let ends: Vec<usize> = example.char_indices().map(|(at, _)| at).chain([example.len()]).collect();
        example[..*to.get(&ends)].to_owned()
    });
    let common = [
        "get_weather",
        "now",
        "{\"a\": [1, \"x\"]}",
        "{",
        "}",
        "\"",
        "\\",
        "<",
        "[",
        "]",
        ",",
        "\n",
        " ",
        "é🙂",
        "word",
        "<think>",
        "</think>",
        "=",
        "'",
        "(",
        ")",
        ":",
        "\\ud83d",
        "1e999",
    ];
    prop_oneof![
        4 => select(marks),
        3 => piece,
        1 => start,
        3 => select(common.to_vec()).prop_map(str::to_owned),
        1 => ".{0,4}",
    ]
    .boxed()
}

fn texts() -> impl Strategy<Value = (ToolFormat, String, bool)> {
    let text = |format| prop::collection::vec(fragments(format), 0..12).prop_map(|parts| parts.concat());
    let format = select(super::cases::formats().collect::<Vec<_>>());
    format.prop_flat_map(move |format| (Just(format), text(format), any::<bool>()))
}

/// `text` in pieces of these lengths in characters, the last piece the rest.
fn cut<'a>(mut text: &'a str, lengths: &[usize]) -> Vec<&'a str> {
    let mut pieces = Vec::new();
    for length in lengths {
        let at = text.char_indices().nth(*length).map_or(text.len(), |(at, _)| at);
        let (piece, rest) = text.split_at(at);
        pieces.push(piece);
        text = rest;
    }
    pieces.push(text);
    pieces
}

/// Whether arguments that end with a letter or digit come from a text that ends with it.
fn ends_alike(format: ToolFormat, text: &str, arguments: &str) -> bool {
    let mark = match format.syntax().arguments {
        Arguments::Tagged { after_value, .. } => without(after_value, &[]),
        _ => String::new(),
    };
    let escaped = arguments.rfind('\\').is_some_and(|at| arguments.len() - at <= 6);
    match arguments.chars().next_back() {
        Some(c) if c.is_ascii_alphanumeric() && !escaped => {
            text.strip_suffix(mark.as_str()).unwrap_or(text).ends_with(c)
        }
        _ => true,
    }
}

/// All formats but Harmony, whose headers are neither text nor arguments.
fn marked() -> Vec<ToolFormat> {
    super::cases::formats().filter(|format| *format != ToolFormat::Harmony).collect()
}

fn without(text: &str, marks: &[&str]) -> String {
    // White space around marks is dropped, also that which belongs to them.
    marks.iter().fold(text.to_owned(), |text, mark| text.replace(mark.trim(), "")).split_whitespace().collect()
}

proptest! {
    #[test]
    fn any_split_gives_the_same((format, text, thinks) in texts(), lengths in prop::collection::vec(0usize..9, 0..40)) {
        let prompt = if thinks { "<think>" } else { "" };
        let settings = AnswerSettings::new(super::format(format), Some(&tools()), prompt);
        let whole = read(&settings, [text.as_str()]);
        prop_assert_eq!(&read(&settings, cut(&text, &lengths)), &whole);
        prop_assert_eq!(&read(&settings, text.split_inclusive(|_| true)), &whole);
    }

    #[test]
    fn whole_calls_have_objects_for_arguments((format, text, _) in texts()) {
        let answer = read(&settings(format), [text.as_str()]);
        let is_object = |text: &str| serde_json::from_str::<serde_json::Map<String, Value>>(text).is_ok();
        let objects = answer.calls.iter().filter(|(_, arguments)| is_object(arguments)).count();
        // A call that is not whole may look so, but not the other way round.
        prop_assert!(objects >= answer.complete, "{:?}", answer);
    }

    #[test]
    fn nothing_is_lost((format, text, thinks) in texts()) {
        if !marked().contains(&format) {
            return Ok(());
        }
        let (tool_format, format) = (format, super::format(format));
        let prompt = if thinks { format.reasoning.unwrap().open } else { "" };
        let reasoning = [format.reasoning.unwrap().open, format.reasoning.unwrap().close];
        for tools in [None, Some(tools())] {
            let answer = read(&AnswerSettings::new(format, tools.as_ref(), prompt), [text.as_str()]);
            let said = without(&format!("{}{}", answer.reasoning, answer.content), &reasoning);
            let written = without(&text, &reasoning);
            match answer.calls.as_slice() {
                [] => {
                    let sorted = |text: &str| { let mut all: Vec<char> = text.chars().collect(); all.sort_unstable(); all };
                    prop_assert_eq!(sorted(&said), sorted(&written));
                }
                // The call has taken one piece of the text, up to the last that came out of it.
                [(_, arguments)] if answer.reasoning.is_empty() && !reasoning.iter().any(|mark| text.contains(mark)) => {
                    let (said, written) = (without(&answer.content, &[]), without(&text, &[]));
                    let taken = written.len().saturating_sub(said.len());
                    let fits = |(at, _): (usize, char)| {
                        let Some(piece) = written.get(at..at + taken) else { return false };
                        let around = written[..at].to_owned() + &written[at + taken..];
                        around == said && (answer.complete == 1 || ends_alike(tool_format, piece, arguments))
                    };
                    prop_assert!(written.char_indices().any(fits), "{:?} of {:?}", answer, text);
                }
                _ => prop_assert!(said.len() < written.len()),
            }
        }
    }

    #[test]
    fn no_word_between_calls_is_lost(format in select(marked()), cuts in prop::collection::vec(any::<Index>(), 1..4)) {
        // Cut off anywhere, a word that follows is text or an argument.
        let example = super::cases::example(format);
        let ends: Vec<usize> = example.char_indices().map(|(at, _)| at).chain([example.len()]).collect();
        let text: String = cuts.iter().map(|at| format!("{}QQ", &example[..*at.get(&ends)])).collect();
        let answer = read(&settings(format), [text.as_str()]);
        let calls: String = answer.calls.iter().map(|(name, arguments)| format!("{name}{arguments}")).collect();
        let all = answer.content + &calls;
        prop_assert_eq!(all.matches("QQ").count(), cuts.len(), "{} -> {}", text, all);
    }
}

/// Quadratic work would take minutes.
fn check_time(format: ToolFormat, text: &str) {
    let start = std::time::Instant::now();
    let answer = read(&settings(format), cut(text, &vec![7; text.len() / 7]));
    assert!(start.elapsed().as_secs() < 10, "{format:?}: {:?}", &text[..text.floor_char_boundary(60)]);
    drop(answer);
}

#[test]
fn a_long_answer_costs_linear_time() {
    const LENGTH: usize = 100_000;
    for format in super::cases::formats() {
        let syntax = format.syntax();
        let example = super::cases::example(format);
        let half = &example[..example.find("slo").unwrap()];
        let first = syntax.openings[0];
        let last = first.chars().next_back().unwrap().len_utf8();
        let many = |text: &str| text.repeat(LENGTH / text.len());
        for text in [
            many(" "),
            many("word \n"),
            many("<"),
            many(first),
            many(&first[..first.len() - last]),
            many(half),
            many(example),
            half.to_owned() + &many("x"),
            half.to_owned() + &many("\\\""),
            format!("{}{}", syntax.open, syntax.before_name) + &many("x"),
            "<think>".to_owned() + &many("<think></think>"),
            "<tool_call>{\"name\": \"f\", \"arguments\":".to_owned() + &many(" "),
            half.to_owned() + &many("\\ud83d"),
        ] {
            check_time(format, &text);
        }
    }
}

#[test]
fn an_answer_of_a_megabyte() {
    let text = "<think>".to_owned() + &"Some word. ".repeat(30_000) + "</think>";
    let content = "A line of text, x < y.\n".repeat(15_000);
    let argument = "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"".to_owned() + &"code(); ".repeat(50_000);
    check_time(ToolFormat::Hermes, &(text + &content + &argument + "\"}}</tool_call>"));
}
