//! Whatever is drawn under a grammar of calls, the parser of its format reads as calls that fit the schemas of their tools.

use super::*;
use crate::text::answer::{AnswerPart, Arguments, CallSyntax};
use crate::text::{AnswerFormat, AnswerSettings, AnswerShape, ToolFormat};

const FORMATS: [ToolFormat; 18] = [
    ToolFormat::Hermes,
    ToolFormat::Qwen,
    ToolFormat::Seed,
    ToolFormat::Glm,
    ToolFormat::MiniMax,
    ToolFormat::DeepSeekDsml,
    ToolFormat::DeepSeek,
    ToolFormat::DeepSeekV31,
    ToolFormat::Kimi,
    ToolFormat::MistralArray,
    ToolFormat::Mistral,
    ToolFormat::Llama,
    ToolFormat::Pythonic,
    ToolFormat::Lfm2,
    ToolFormat::ToolCode,
    ToolFormat::FunctionGemma,
    ToolFormat::Gemma,
    ToolFormat::Harmony,
];

/// Marks that are no openings and no `marks`, but special tokens of some models.
const MORE_MARKS: [&str; 9] = [
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "</seed:tool_call>",
    "</minimax:tool_call>",
    "[ARGS]",
    "<end_function_call>",
];

fn answer_format(tools: ToolFormat) -> AnswerFormat {
    AnswerFormat { tools: Some(tools), reasoning: None }
}

/// Bytes, and the marks of `format` as special tokens unless they are `spelled`.
fn vocabulary_of(format: ToolFormat, spelled: bool) -> Arc<GrammarVocabulary> {
    let mut tokens = tokens();
    // Harmony has a mark of the name that it has in the other tests.
    tokens[EOS as usize] = b"\xff<|eos|>".to_vec();
    if !spelled {
        let format = answer_format(format);
        let marks = format.marks(true).chain(MORE_MARKS);
        let mut marks: Vec<&str> = marks.filter(|mark| *mark != "```tool_code").collect();
        marks.sort_unstable();
        marks.dedup();
        tokens.extend(marks.into_iter().map(|mark| [b"\xff", mark.as_bytes()].concat()));
    }
    Arc::new(GrammarVocabulary::of_tokens(tokens, &[EOS]).unwrap())
}

/// The calls of `tools` in a request that must have some.
fn calls_of(format: ToolFormat, tools: &[Value], parallel: bool) -> ToolCalls {
    let harmony = format == ToolFormat::Harmony;
    let syntax =
        CallSyntax { after_arguments: if harmony { "" } else { format.syntax().after_arguments }, ..*format.syntax() };
    ToolCalls::new(&syntax, tools, None, parallel && !harmony).unwrap()
}

fn in_format(format: ToolFormat, constraint: Constraint) -> Constraint {
    if format == ToolFormat::Harmony { Constraint::Channels(Box::new(constraint), Some(0)) } else { constraint }
}

fn tool(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

/// Name and arguments of the calls in an answer, and its other text.
fn parse(format: ToolFormat, tools: &[Value], shape: AnswerShape, text: &str) -> (Vec<(String, Value)>, String) {
    let settings = AnswerSettings::new(answer_format(format), Some(&json!(tools)), "<|start|>assistant").shaped(shape);
    let mut parser = settings.parser(1);
    let mut parts = parser.push(text);
    parts.extend(parser.finish());
    let (mut calls, mut said) = (Vec::<(String, String)>::new(), String::new());
    for part in parts {
        match part {
            AnswerPart::Content(text) => said += &text,
            AnswerPart::Reasoning(_) => {}
            AnswerPart::Call { index, name, arguments, .. } => {
                calls.resize(calls.len().max(index + 1), (name, String::new()));
                calls[index].1 += &arguments;
            }
        }
    }
    if parser.complete_calls() < calls.len() {
        said += " (incomplete)";
    }
    let value = |text: String| serde_json::from_str(&text).unwrap_or(Value::String(text));
    (calls.into_iter().map(|(name, arguments)| (name, value(arguments))).collect(), said)
}

/// The next token of `text`: a special one where there is such, else a byte.
fn next_token(vocabulary: &GrammarVocabulary, text: &str) -> u32 {
    let special = (BYTES + 256..vocabulary.vocab() as u32)
        .filter(|id| vocabulary.is_special(*id) && text.as_bytes().starts_with(vocabulary.token_bytes(*id)));
    let longest = special.max_by_key(|id| vocabulary.token_bytes(*id).len());
    longest.unwrap_or(BYTES + u32::from(text.as_bytes()[0]))
}

/// Feeds `text`; how many bytes of it were allowed, and whether it may end there.
fn feed_text(vocabulary: &GrammarVocabulary, matcher: &mut TokenMatcher, text: &str) -> (usize, bool) {
    let mut at = 0;
    while at < text.len() {
        // Bytes within a character are tokens, too.
        let token = match text.get(at..) {
            Some(rest) => next_token(vocabulary, rest),
            None => BYTES + u32::from(text.as_bytes()[at]),
        };
        if matcher.must_end() || !matcher.accepts(token) {
            break;
        }
        matcher.accept(token).unwrap();
        at += vocabulary.token_bytes(token).len();
    }
    (at, matcher.may_end())
}

/// How much of `text` is allowed; `usize::MAX` if more has to follow.
fn fits(vocabulary: &Arc<GrammarVocabulary>, constraint: &Constraint, text: &str) -> usize {
    let (at, ends) = feed_text(vocabulary, &mut vocabulary.compile(constraint).unwrap(), text);
    if at == text.len() && !ends { usize::MAX } else { at }
}

/// No arguments. Any would be fine for the grammar, but a number that is out of range nobody reads.
fn nothing() -> Value {
    json!({ "type": "object", "properties": {}, "additionalProperties": false })
}

/// A random schema whose names every format can write.
fn schema(seed: u64) -> Value {
    let text = random_schema(seed).to_string().replace("in stock", "in_stock").replace("a\\\"b", "a_b");
    serde_json::from_str(&text).unwrap()
}

fn cases() -> u64 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(25)
}

#[test]
fn every_call_under_a_grammar_is_read_and_fits_its_schema() {
    for format in FORMATS {
        // Where marks are special tokens, and where they are spelled.
        let (mut refused, mut most) = (0, [0; 2]);
        for seed in 0..cases() {
            let tools = [tool("find_it", schema(seed)), tool("add", schema(seed + 1000)), tool("now", nothing())];
            let tools = if seed % 2 == 0 { &tools[..2] } else { &tools[..] };
            let vocabulary = vocabulary_of(format, seed % 3 == 0);
            let constraint = in_format(format, Constraint::ToolCalls(calls_of(format, tools, seed % 5 > 0)));
            let matcher = match vocabulary.compile(&constraint) {
                Err(error) if error.status() == Status::Unsupported => {
                    refused += 1;
                    continue;
                }
                matcher => matcher.unwrap_or_else(|error| panic!("{format:?} {seed}: {error}")),
            };
            let (text, _) = random_answer(&vocabulary, matcher, &mut Random::new(seed));
            let (calls, said) = parse(format, tools, AnswerShape::Calls, &text);
            assert!(!calls.is_empty() && said.trim().is_empty(), "{format:?} {seed}: {said:?} in {text:?}");
            let most = &mut most[usize::from(seed % 3 == 0)];
            *most = (*most).max(calls.len());
            for (name, arguments) in &calls {
                let tool = tools.iter().find(|tool| tool["function"]["name"] == *name).expect("a tool");
                let schema = &tool["function"]["parameters"];
                assert_eq!(violation(schema, schema, arguments), None, "{format:?} {seed}: {text:?}");
                assert!(arguments.is_object(), "{format:?}: {text:?}");
            }
        }
        assert!(refused <= cases() * 3 / 4, "{format:?}: {refused} refused");
        let parallel = most.iter().all(|most| *most > 1);
        assert!(parallel || format == ToolFormat::Harmony, "{format:?}: calls are never parallel: {most:?}");
    }
}

#[test]
fn an_answer_is_calls_or_the_form() {
    let form = json!({ "type": "object", "properties": { "a": { "type": "integer", "minimum": 0, "maximum": 99 } },
        "required": ["a"], "additionalProperties": false });
    let tools = [tool(
        "add",
        json!({ "type": "object", "properties": { "x": { "enum": ["one", "two"] } },
        "additionalProperties": false }),
    )];
    for format in FORMATS {
        for other in [
            Constraint::JsonSchema(form.clone()),
            Constraint::Regex("[a-z<\\[`]{1,3}/?".to_owned()),
            Constraint::Lark("start: \"(\" start \")\" | /[0-9]/".to_owned()),
            choice(&["yes", "no"]),
        ] {
            let (mut called, mut said_it) = (0, 0);
            for seed in 0..cases() {
                let calls = calls_of(format, &tools, true).marked();
                let constraint = in_format(format, Constraint::Either(calls, Box::new(other.clone())));
                let vocabulary = vocabulary_of(format, seed % 4 == 0);
                let mut matcher = vocabulary.compile(&constraint).unwrap();
                // Of all that may come first calls are a small part.
                let first = match format {
                    _ if seed % 2 == 0 => "",
                    ToolFormat::Harmony => "<|channel|>c",
                    format => format.syntax().openings[0],
                };
                assert_eq!(feed_text(&vocabulary, &mut matcher, first).0, first.len(), "{format:?}");
                let (rest, _) = random_answer(&vocabulary, matcher, &mut Random::new(seed));
                let text = format!("{first}{rest}");
                let (calls, said) = parse(format, &tools, AnswerShape::CallsOrText, &text);
                assert!(calls.is_empty() || said.trim().is_empty(), "{format:?}: {calls:?} and {said:?} in {text:?}");
                called += u64::from(!calls.is_empty());
                if calls.is_empty() {
                    let form = tiny_form(&other, &said);
                    assert!(form, "{format:?}: {said:?} of {text:?} is not {other:?}");
                    said_it += 1;
                }
                for (name, arguments) in calls {
                    assert_eq!(name, "add");
                    assert!(arguments == json!({}) || ["one", "two"].iter().any(|x| arguments == json!({ "x": x })));
                }
            }
            assert!(called > 0 && said_it > 0, "{format:?} {other:?}: {called} calls, {said_it} answers");
        }
    }
}

/// Whether `text` is of the form.
fn tiny_form(form: &Constraint, text: &str) -> bool {
    match form {
        Constraint::JsonSchema(schema) => {
            serde_json::from_str(text).is_ok_and(|value| violation(schema, schema, &value).is_none())
        }
        Constraint::Regex(_) => (1..=4).contains(&text.len()),
        Constraint::Choice(texts) => texts.iter().any(|choice| choice == text),
        _ => text.trim_matches(['(', ')']).len() == 1,
    }
}

/// A JSON object that looks like Llama's call is the answer where that was asked for.
#[test]
fn what_was_asked_for_is_no_call_because_it_looks_so() {
    let tools = [tool("add", json!({ "type": "object", "properties": {} }))];
    let text = "{\"name\": \"add\", \"parameters\": {}}";
    for (shape, calls) in [(AnswerShape::Free, 1), (AnswerShape::CallsOrText, 0)] {
        assert_eq!(parse(ToolFormat::Llama, &tools, shape, text).0.len(), calls);
    }
    let marked = parse(ToolFormat::Llama, &tools, AnswerShape::CallsOrText, &format!("<|python_tag|>{text}"));
    assert_eq!(marked.0.len(), 1);
    let said = "{\"a\": \"<tool_call><function=add></function></tool_call>\"}";
    for (shape, calls) in [(AnswerShape::Free, 1), (AnswerShape::CallsOrText, 0)] {
        assert_eq!(parse(ToolFormat::Qwen, &tools, shape, said).0.len(), calls);
    }
    let choice = Constraint::Either(calls_of(ToolFormat::Qwen, &tools, true), Box::new(choice(&["<tool_call>"])));
    assert_eq!(vocabulary_of(ToolFormat::Qwen, true).compile(&choice).unwrap_err().status(), Status::Unsupported);
}

/// What an argument of `schema` may be between Qwen's tags, and what it then is.
fn qwen(schema: &Value, value: &str) -> Option<Value> {
    let tools = [tool(
        "f",
        json!({ "type": "object", "required": ["a"], "properties": { "a": schema },
        "$defs": { "color": { "enum": ["red", "blue"] }, "size": { "type": "integer" } } }),
    )];
    let text = format!("<tool_call>\n<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>\n</tool_call>");
    let constraint = Constraint::ToolCalls(calls_of(ToolFormat::Qwen, &tools, false));
    let found: Vec<Option<Value>> = [false, true]
        .into_iter()
        .map(|spelled| {
            (fits(&vocabulary_of(ToolFormat::Qwen, spelled), &constraint, &text) == text.len()).then(|| {
                let (calls, said) = parse(ToolFormat::Qwen, &tools, AnswerShape::Calls, &text);
                assert_eq!((calls.len(), said.as_str()), (1, ""), "{text}");
                calls[0].1["a"].clone()
            })
        })
        .collect();
    assert_eq!(found[0], found[1], "{text}");
    found[0].clone()
}

#[test]
fn values_without_quotes_are_what_their_schema_says() {
    let text = json!({ "type": "string" });
    assert_eq!(qwen(&text, "12"), Some(json!("12")));
    assert_eq!(qwen(&text, ""), Some(json!("")));
    assert_eq!(qwen(&text, "\n<b> \"x\"\\\n\n"), Some(json!("\n<b> \"x\"\\\n\n")));
    assert_eq!(qwen(&text, "a</parameter>\nb"), None);
    assert_eq!(qwen(&text, "a\n</function>\nb"), None);
    let short = json!({ "type": "string", "minLength": 2, "maxLength": 3 });
    assert_eq!((qwen(&short, "é"), qwen(&short, "éé"), qwen(&short, "abcd")), (None, Some(json!("éé")), None));
    for (pattern, fine, wrong) in
        [("^a+$", "aa", "aab"), ("^a", "ab", "ba"), ("a/b", "xa/by", "ab"), ("\\$", "x$", "x")]
    {
        let schema = json!({ "type": "string", "pattern": pattern });
        assert_eq!((qwen(&schema, fine), qwen(&schema, wrong)), (Some(json!(fine)), None), "{pattern}");
    }
    let date = json!({ "type": "string", "format": "date" });
    assert_eq!((qwen(&date, "2026-11-30"), qwen(&date, "2026-13-30")), (None, None));
    assert_eq!(qwen(&date, "2026-11-28"), Some(json!("2026-11-28")));
    assert_eq!(qwen(&json!({ "type": "integer" }), "12"), Some(json!(12)));
    assert_eq!(qwen(&json!({ "type": "integer" }), "x"), None);
    let nullable = json!({ "type": ["string", "null"], "minLength": 9 });
    assert_eq!((qwen(&nullable, "null"), qwen(&nullable, "short")), (Some(Value::Null), None));
    // Strings that look like something else would be that: they cannot be written, what else is allowed can.
    let either = json!({ "anyOf": [{ "type": "string" }, { "type": "integer" }, { "type": "array", "items": { "type": "null" } }] });
    for (value, read) in [
        ("12", Some(json!(12))),
        ("12 x", Some(json!("12 x"))),
        ("True", None),
        (" null ", None),
        ("1.5", None),
        ("[null]", Some(json!([null]))),
        ("[x]", None),
        ("nullable", Some(json!("nullable"))),
    ] {
        assert_eq!(qwen(&either, value), read, "{value}");
    }
    let anything = json!({});
    for (value, read) in [("true", json!(true)), ("{\"a\": [1]}", json!({ "a": [1] })), ("it's", json!("it's"))] {
        assert_eq!(qwen(&anything, value), Some(read), "{value}");
    }
    let color = json!({ "$ref": "#/$defs/color" });
    assert_eq!((qwen(&color, "red"), qwen(&color, "green")), (Some(json!("red")), None));
    let sizes = json!({ "type": "array", "items": { "$ref": "#/$defs/size" } });
    assert_eq!((qwen(&sizes, "[1, 2]"), qwen(&sizes, "[\"a\"]")), (Some(json!([1, 2])), None));
    // The end of a value within a string of one is not its end.
    let edits = json!({ "type": "array", "items": { "type": "string" } });
    assert_eq!(qwen(&edits, "[\"</parameter>\\n\"]"), Some(json!(["</parameter>\n"])));
}

/// Without the grammar a value ends at the first end: most models mean that.
#[test]
fn ends_within_json_are_read_only_where_it_is_certain() {
    let tools = [tool("f", json!({ "type": "object", "properties": { "a": { "type": "array" } } }))];
    let text = "<tool_call>\n<function=f>\n<parameter=a>\n[\"</parameter>\"]\n</parameter>\n</function>\n</tool_call>";
    assert_eq!(parse(ToolFormat::Qwen, &tools, AnswerShape::Calls, text).0[0].1["a"], json!(["</parameter>"]));
    let (calls, said) = parse(ToolFormat::Qwen, &tools, AnswerShape::Free, text);
    assert!(calls[0].1 != json!({ "a": ["</parameter>"] }) && !said.is_empty());
}

#[test]
fn what_these_grammars_cannot_hold_to_is_refused() {
    let compile = |format: ToolFormat, parameters: Value| {
        let constraint = Constraint::ToolCalls(calls_of(format, &[tool("f", parameters)], true));
        vocabulary_of(format, true).compile(&constraint).map(|_| ()).map_err(|error| error.status())
    };
    let argument = |schema: Value| json!({ "type": "object", "properties": { "a": schema } });
    for (parameters, expected) in [
        (argument(json!({ "type": "string", "format": "regex" })), Err(Status::Unsupported)),
        (argument(json!({ "type": "string", "not": {} })), Err(Status::Unsupported)),
        (argument(json!({ "type": ["string", "integer"], "minimum": 3 })), Err(Status::Unsupported)),
        (
            argument(json!({ "oneOf": [{ "type": "string" }, { "type": "string", "maxLength": 3 }] })),
            Err(Status::Unsupported),
        ),
        (argument(json!({ "enum": ["</parameter>"] })), Err(Status::Unsupported)),
        (argument(json!({ "const": "12" })), Err(Status::Unsupported)),
        (argument(json!({ "$ref": "#" })), Err(Status::Unsupported)),
        (argument(json!({ "type": "array", "items": { "$ref": "#/properties/a" } })), Err(Status::Unsupported)),
        (argument(json!({ "$ref": "#/$defs/none" })), Err(Status::InvalidRequest)),
        (argument(json!({ "type": "strnig" })), Err(Status::InvalidRequest)),
        (json!({ "type": "object", "minProperties": 2 }), Err(Status::Unsupported)),
        (json!({ "type": "array" }), Err(Status::InvalidRequest)),
        (json!({ "type": "object", "required": ["a"], "additionalProperties": false }), Err(Status::InvalidRequest)),
        (json!({ "type": "object", "properties": { "a>": {} } }), Err(Status::Unsupported)),
        (argument(json!({ "type": "string", "description": "d", "default": "x" })), Ok(())),
        (argument(json!({ "oneOf": [{ "const": "a" }, { "const": "b" }] })), Ok(())),
    ] {
        assert_eq!(compile(ToolFormat::Qwen, parameters.clone()), expected, "{parameters}");
    }
    assert_eq!(
        compile(ToolFormat::Lfm2, json!({ "type": "object", "properties": { "a b": {} } })),
        Err(Status::Unsupported)
    );
    assert!(FORMATS.iter().all(|format| format.may_call("get_weather")));
    assert!(
        !ToolFormat::Hermes.may_call("a\"b") && !ToolFormat::Lfm2.may_call("3d") && !ToolFormat::Glm.may_call("a b")
    );
    let is_json = |format: &&ToolFormat| format.syntax().arguments == Arguments::Json;
    assert_eq!(FORMATS.iter().filter(is_json).count(), 8);
}

#[test]
fn calls_end_the_thinking_of_models_whose_calls_do() {
    let marked = |ends: bool| {
        let mut tokens = tokens();
        tokens.push(b"\xff<tool_call>".to_vec());
        let ids = [vec![OPEN], vec![CLOSE]];
        let vocabulary = GrammarVocabulary::of_tokens(tokens, &[EOS]).unwrap().with_thinking(&markers(), ids).unwrap();
        let vocabulary = Arc::new(vocabulary);
        let calls = calls_of(ToolFormat::Qwen, &[tool("now", json!({}))], false);
        let matcher = vocabulary.compile(&Constraint::ToolCalls(calls)).unwrap();
        let guide = Guide::new(Arc::clone(&vocabulary), Some(matcher), ThinkingStart::Opened, None).unwrap();
        (if ends { guide.ended_by_calls() } else { guide }, vocabulary.vocab() as u32 - 1)
    };
    for ends in [true, false] {
        let (mut guide, call) = marked(ends);
        feed(&mut guide, &[id("ab"), call]);
        assert_eq!(allows(&mut guide, id("ab")), !ends, "behind the call's mark comes the call");
        if ends {
            let rest = "\n<function=now>\n</function>\n</tool_call>";
            feed(&mut guide, &rest.bytes().map(|byte| BYTES + u32::from(byte)).collect::<Vec<_>>());
            assert!(guide.is_complete());
        }
    }
}

#[test]
fn thinking_in_channels_has_its_budget() {
    let tools = [tool("now", json!({}))];
    let vocabulary = vocabulary_of(ToolFormat::Harmony, false);
    let token = |text: &str| {
        let of = |id: &u32| vocabulary.is_special(*id) && vocabulary.token_bytes(*id) == text.as_bytes();
        (0..vocabulary.vocab() as u32).find(of).unwrap()
    };
    let spell = |text: &str| text.bytes().map(|byte| BYTES + u32::from(byte)).collect::<Vec<_>>();
    let calls = || Constraint::ToolCalls(calls_of(ToolFormat::Harmony, &tools, true));
    let mut limited = vocabulary.compile(&Constraint::Channels(Box::new(calls()), Some(3))).unwrap();
    for id in [&[token("<|channel|>")], &spell("analysis")[..], &[token("<|message|>")], &spell("hmm")].concat() {
        assert!(limited.accepts(id));
        limited.accept(id).unwrap();
    }
    assert_eq!(limited.mask().unwrap().tokens().collect::<Vec<_>>(), [token("<|end|>")]);
    let mut none = vocabulary.compile(&Constraint::Channels(Box::new(calls()), Some(0))).unwrap();
    none.accept(token("<|channel|>")).unwrap();
    assert!(none.accepts(spell("c")[0]) && !none.accepts(spell("a")[0]));
    let form = Constraint::Channels(Box::new(choice(&["yes"])), None);
    let text = "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>yes";
    assert_eq!(fits(&vocabulary, &form, text), text.len());
}
