use std::path::Path;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::error::Status;
use crate::text::{TextModel, ToolFormat};

mod calls;
#[path = "../../../tests/structured/schemas.rs"]
mod schemas;

use schemas::{Random, random_schema, violation};

const EOS: u32 = 0;
const OPEN: u32 = 1;
const CLOSE: u32 = 2;
/// Of the token that is the byte 0.
const BYTES: u32 = 3;

/// Some longer tokens behind the end, two markers and the single bytes.
const PIECES: [&str; 18] = [
    "{\"", "\":", "true", "ab", "abc", "\"}", " \n", "name", ", \"", "},", "12", "é", ">{", ">\n", "</", "think", "ye",
    "s",
];

fn tokens() -> Vec<Vec<u8>> {
    let special = |text: &str| [b"\xff", text.as_bytes()].concat();
    let mut tokens = vec![special("<|end|>"), special("<think>"), special("</think>")];
    tokens.extend((0..=255).map(|byte| vec![byte]));
    tokens.extend(PIECES.iter().map(|piece| piece.as_bytes().to_vec()));
    tokens
}

fn markers() -> ThinkingMarkers {
    ThinkingMarkers { open: "<think>".into(), close: "</think>".into() }
}

/// The vocabulary above. The markers are tokens, or are spelled.
fn vocabulary(marker_tokens: bool) -> Arc<GrammarVocabulary> {
    let mut tokens = tokens();
    if !marker_tokens {
        tokens[OPEN as usize].clear();
        tokens[CLOSE as usize].clear();
    }
    let spelled = |text: &str| text.bytes().map(|byte| BYTES + u32::from(byte)).collect::<Vec<_>>();
    let ids = if marker_tokens { [vec![OPEN], vec![CLOSE]] } else { ["<think>", "</think>"].map(spelled) };
    Arc::new(GrammarVocabulary::of_tokens(tokens, &[EOS]).unwrap().with_thinking(&markers(), ids).unwrap())
}

fn id(text: &str) -> u32 {
    match PIECES.iter().position(|piece| *piece == text) {
        Some(at) => BYTES + 256 + at as u32,
        None => BYTES + u32::from(text.as_bytes()[0]),
    }
}

fn choice(texts: &[&str]) -> Constraint {
    Constraint::Choice(texts.iter().map(|text| (*text).to_owned()).collect())
}

fn tiny_chat() -> &'static Arc<GrammarVocabulary> {
    static BUILT: OnceLock<Arc<GrammarVocabulary>> = OnceLock::new();
    BUILT.get_or_init(|| {
        let model = TextModel::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat")).unwrap();
        let vocabulary = GrammarVocabulary::new(model.tokenizer().unwrap(), 4096, &[2, 0], Some(markers()));
        Arc::new(vocabulary.unwrap())
    })
}

/// Draws allowed tokens at random until the answer ends; its text, and how many tokens it took.
fn random_answer(vocabulary: &Arc<GrammarVocabulary>, matcher: TokenMatcher, random: &mut Random) -> (String, usize) {
    let mut guide = Guide::new(Arc::clone(vocabulary), Some(matcher), ThinkingStart::Free, None).unwrap();
    let mut text = Vec::new();
    for count in 0..5000 {
        if guide.is_complete() {
            return (String::from_utf8(text).unwrap(), count);
        }
        let mask = guide.mask().unwrap().expect("a constraint has a mask");
        let allowed: Vec<u32> = mask.tokens().filter(|id| *id != 3 || vocabulary.vocab() != 4096).collect();
        let token = allowed[random.below(allowed.len())];
        if vocabulary.eos().contains(&token) {
            return (String::from_utf8(text).unwrap(), count);
        }
        text.extend(vocabulary.token_bytes(token));
        guide.accept(token).unwrap();
    }
    panic!("no end: {}", String::from_utf8_lossy(&text));
}

/// The mask of a choice is what the definition says: what some of its texts goes on with.
#[test]
fn a_choice_allows_what_continues_one_of_its_texts() {
    let vocabulary = vocabulary(true);
    let texts = ["abc", "abd", "a\"}", "é", "yes", "12 é\n"];
    let compiled = vocabulary.compile(&choice(&texts)).unwrap();
    let mut open = vec![(compiled, Vec::new())];
    let mut seen = 0;
    while let Some((mut matcher, text)) = open.pop() {
        let may_end = texts.iter().any(|whole| whole.as_bytes() == text);
        assert_eq!(matcher.may_end(), may_end, "{text:?}");
        let mask = matcher.mask().unwrap();
        for token in 0..vocabulary.vocab() as u32 {
            let bytes = vocabulary.token_bytes(token);
            let next = [&text[..], bytes].concat();
            let fits = if token < BYTES {
                token == EOS && may_end
            } else {
                !bytes.is_empty() && texts.iter().any(|whole| whole.as_bytes().starts_with(&next))
            };
            assert_eq!(mask.allows(token), fits, "{token} behind {text:?}");
            if fits && token != EOS {
                let mut longer = matcher.clone();
                longer.accept(token).unwrap();
                open.push((longer, next));
            }
        }
        seen += 1;
    }
    assert!(seen > texts.len() * 3, "{seen} states");
}

/// A token is allowed where its bytes, one by one, are.
fn check_against_bytes(vocabulary: &GrammarVocabulary, matcher: &mut TokenMatcher) -> Result<(), TestCaseError> {
    let mask = matcher.mask().unwrap();
    for token in BYTES + 256..vocabulary.vocab() as u32 {
        let mut by_bytes = matcher.clone();
        let fits = vocabulary.token_bytes(token).iter().all(|byte| {
            let byte = BYTES + u32::from(*byte);
            let fits = !by_bytes.must_end() && by_bytes.mask().unwrap().allows(byte);
            fits && by_bytes.accept(byte).is_ok()
        });
        prop_assert_eq!(mask.allows(token), fits, "token {}", token);
    }
    prop_assert!(!mask.allows(OPEN) && !mask.allows(CLOSE), "a marker within an answer");
    prop_assert_eq!(mask.allows(EOS), matcher.may_end());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(100),
        ..ProptestConfig::default()
    })]

    #[test]
    fn masks_are_those_of_single_bytes(seed in any::<u64>()) {
        static SMALL: OnceLock<Arc<GrammarVocabulary>> = OnceLock::new();
        let vocabulary = SMALL.get_or_init(|| vocabulary(true));
        let mut random = Random::new(seed);
        let constraint = match random.below(3) {
            0 => Constraint::JsonSchema(random_schema(seed)),
            1 => Constraint::Regex("(ab|abc)*\\{\"?[a-eé]{1,3}\"?: ?(12)+\\}".to_owned()),
            _ => Constraint::JsonObject,
        };
        let mut matcher = vocabulary.compile(&constraint).unwrap();
        for _ in 0..random.below(12) {
            let allowed: Vec<u32> = matcher.mask().unwrap().tokens().filter(|id| *id != EOS).collect();
            let Some(token) = allowed.get(random.below(allowed.len().max(1))) else { break };
            matcher.accept(*token).unwrap();
            if matcher.must_end() {
                return Ok(());
            }
        }
        check_against_bytes(vocabulary, &mut matcher)?;
    }

    /// Whatever is drawn, the answer is JSON that the schema accepts.
    #[test]
    fn every_answer_under_a_schema_is_valid(seed in any::<u64>()) {
        let schema = random_schema(seed);
        let matcher = tiny_chat().compile(&Constraint::JsonSchema(schema.clone())).unwrap();
        let (text, _) = random_answer(tiny_chat(), matcher, &mut Random::new(!seed));
        let value: Value = serde_json::from_str(&text).map_err(|e| TestCaseError::fail(format!("{text}: {e}")))?;
        prop_assert_eq!(violation(&schema, &schema, &value), None);
    }
}

/// The validator sees what is wrong.
#[test]
fn wrong_values_are_violations() {
    let schema = json!({ "type": "object", "properties": { "a": { "type": "integer", "minimum": 3 } },
        "required": ["a"], "additionalProperties": false });
    for (value, fine) in [
        (json!({ "a": 3 }), true),
        (json!({ "a": 2 }), false),
        (json!({ "a": "3" }), false),
        (json!({}), false),
        (json!({ "a": 3, "b": 1 }), false),
        (json!([]), false),
    ] {
        assert_eq!(violation(&schema, &schema, &value).is_none(), fine, "{value}");
    }
}

#[test]
fn what_cannot_be_generated_is_refused_before() {
    let schema = |schema: Value| Constraint::JsonSchema(schema);
    let deep = |open: &str, close: &str, count| open.repeat(count) + "\"a\"" + &close.repeat(count);
    let mut nested = json!({ "type": "string" });
    for _ in 0..100 {
        nested = json!({ "type": "array", "items": nested });
    }
    for (constraint, expected) in [
        (schema(json!({ "type": "strnig" })), Err(Status::InvalidRequest)),
        (schema(json!({ "type": 3 })), Err(Status::InvalidRequest)),
        (schema(json!([])), Err(Status::InvalidRequest)),
        (schema(json!(false)), Err(Status::InvalidRequest)),
        (schema(json!({ "type": "integer", "minimum": 3, "maximum": 2 })), Err(Status::InvalidRequest)),
        (schema(json!({ "$ref": "#/$defs/none" })), Err(Status::InvalidRequest)),
        (schema(json!({ "$ref": "https://example.com/schema" })), Err(Status::Unsupported)),
        (schema(json!({ "not": { "type": "string" } })), Err(Status::Unsupported)),
        (schema(json!({ "type": "array", "uniqueItems": true })), Err(Status::Unsupported)),
        (schema(json!({ "oneOf": [{ "type": "string" }, { "maxLength": 3 }] })), Err(Status::Unsupported)),
        // A schema cannot loosen the rules for itself.
        (schema(json!({ "not": { "type": "string" }, "x-guidance": { "lenient": true } })), Err(Status::Unsupported)),
        (schema(json!(true)), Ok(())),
        (schema(nested), Ok(())),
        (Constraint::Regex("a(b".to_owned()), Err(Status::InvalidRequest)),
        (Constraint::Regex(String::new()), Err(Status::InvalidRequest)),
        (Constraint::Regex("(a|b){3}/\"'".to_owned()), Ok(())),
        (Constraint::Regex("x".repeat(2 << 20)), Err(Status::InvalidRequest)),
        (Constraint::Regex(deep("(", ")", 100_000)), Err(Status::InvalidRequest)),
        (Constraint::Lark("start: undefined".to_owned()), Err(Status::InvalidRequest)),
        (Constraint::Lark("nothing: \"a\"".to_owned()), Err(Status::InvalidRequest)),
        (Constraint::Lark("start: \"\"".to_owned()), Err(Status::InvalidRequest)),
        (Constraint::Lark("start: \"(\" start \")\" | \"x\"".to_owned()), Ok(())),
        (Constraint::Lark(format!("start: {}", deep("(", ")", 20))), Ok(())),
        (Constraint::Lark(format!("start: {}", deep("(", ")", 100_000))), Err(Status::InvalidRequest)),
        (choice(&[]), Err(Status::InvalidRequest)),
        (choice(&["a", ""]), Err(Status::InvalidRequest)),
        (choice(&["a\"\\\n/", "{}"]), Ok(())),
    ] {
        let outcome = tiny_chat().compile(&constraint).map(|_| ()).map_err(|error| error.status());
        let shown: String = format!("{constraint:?}").chars().take(120).collect();
        assert_eq!(outcome, expected, "{shown}: {:?}", tiny_chat().compile(&constraint).err());
    }
    let error = tiny_chat().compile(&schema(json!({ "type": "strnig" }))).unwrap_err();
    assert!(error.message().contains("strnig") && !error.message().contains('<'), "{error}");
}

#[test]
fn white_space_ends_although_the_model_does_not_know_how_to_go_on() {
    let mut matcher = tiny_chat().compile(&Constraint::JsonObject).unwrap();
    let space = token_of(b" ");
    matcher.accept(token_of(b"{")).unwrap();
    let spaces = (0..100).take_while(|_| matcher.accepts(space) && matcher.accept(space).is_ok()).count();
    assert_eq!(spaces, 64);
    matcher.accept(token_of(b"}")).unwrap();
    assert!(matcher.must_end(), "nothing may follow the object");
}

fn token_of(bytes: &[u8]) -> u32 {
    (0..4096).find(|id| tiny_chat().token_bytes(*id) == bytes).unwrap()
}

fn guide(marker_tokens: bool, matcher: bool, opened: bool, budget: Option<usize>) -> Option<Guide> {
    let vocabulary = vocabulary(marker_tokens);
    let matcher = matcher.then(|| vocabulary.compile(&choice(&["{ab}", "yes"])).unwrap());
    let start = if opened { ThinkingStart::Opened } else { ThinkingStart::Free };
    Guide::new(vocabulary, matcher, start, budget)
}

/// Feeds tokens that must be allowed.
fn feed(guide: &mut Guide, tokens: &[u32]) {
    for token in tokens {
        let mask = guide.mask().unwrap();
        assert!(mask.is_none_or(|mask| mask.allows(*token)), "{token} in {guide:?}");
        guide.accept(*token).unwrap();
    }
}

fn allows(guide: &mut Guide, token: u32) -> bool {
    guide.mask().unwrap().is_none_or(|mask| mask.allows(token))
}

#[test]
fn the_constraint_begins_behind_the_thinking() {
    let mut opened = guide(true, true, true, None).unwrap();
    feed(&mut opened, &[id("ab"), id("{"), id("\n")]);
    assert!(!allows(&mut opened, EOS), "the answer would be empty");
    feed(&mut opened, &[CLOSE]);
    assert!(!allows(&mut opened, id("ab")) && !allows(&mut opened, EOS) && !allows(&mut opened, CLOSE));
    feed(&mut opened, &[id(" \n"), id("ye"), id("s")]);
    assert!(opened.is_complete());

    // The model opens it itself, or does not think.
    let mut own = guide(true, true, false, None).unwrap();
    assert!(!allows(&mut own, id("ab")));
    let mut none = own.clone();
    feed(&mut own, &[OPEN, id("ab"), CLOSE, id("ye"), id("s")]);
    feed(&mut none, &[id("ye"), id("s")]);
    assert!(own.is_complete() && none.is_complete());
    assert!(own.accept(id("s")).is_err(), "nothing follows a complete answer");
}

#[test]
fn markers_may_be_spelled() {
    let spell = |text: &str| text.bytes().map(|byte| BYTES + u32::from(byte)).collect::<Vec<_>>();
    let mut spelled = guide(false, true, false, None).unwrap();
    feed(&mut spelled, &spell("<thi"));
    assert!(!allows(&mut spelled, id("ye")), "only the rest of the marker can follow");
    feed(&mut spelled, &spell("nk>"));
    // Almost the marker, and then the marker.
    feed(&mut spelled, &spell("a</</thin"));
    let mut crossing = spelled.clone();
    feed(&mut crossing, &spell("k"));
    assert!(!allows(&mut crossing, id(">{")), "text behind the marker that the grammar has not seen");
    feed(&mut crossing, &[id(">\n"), id("ye"), id("s")]);
    assert!(crossing.is_complete());
    feed(&mut spelled, &[&spell("k>{ab}")[..], &[]].concat());
    assert!(spelled.is_complete());
    // What has begun with a part of the marker, but is none, is not allowed.
    let mut other = guide(false, true, false, None).unwrap();
    feed(&mut other, &spell("<"));
    assert!(other.accept(id("ab")).is_err());
}

#[test]
fn a_budget_ends_the_thinking() {
    for constrained in [false, true] {
        let mut spent = guide(true, constrained, true, Some(3)).unwrap();
        assert_eq!(spent.depends_on_unread(), constrained);
        feed(&mut spent, &[id("ab"), id("ab")]);
        assert!(spent.depends_on_unread());
        feed(&mut spent, &[id("ab")]);
        let mask = spent.mask().unwrap().unwrap();
        assert_eq!(mask.tokens().collect::<Vec<_>>(), [CLOSE]);
        feed(&mut spent, &[CLOSE]);
        assert_eq!(spent.mask().unwrap().is_some(), constrained);
        assert_eq!(spent.depends_on_unread(), constrained);
        feed(&mut spent, &[id("ye"), id("s")]);
        assert_eq!(spent.is_complete(), constrained);

        // No thinking at all: whoever opened it.
        let mut closed = guide(true, constrained, true, Some(0)).unwrap();
        assert_eq!(closed.mask().unwrap().unwrap().tokens().collect::<Vec<_>>(), [CLOSE]);
        feed(&mut closed, &[CLOSE, id("ye")]);
        let mut own = guide(true, constrained, false, Some(0)).unwrap();
        assert!(own.depends_on_unread());
        feed(&mut own, &[OPEN, CLOSE, id("ye"), id("s")]);
        // Who is done before the budget is spent is not disturbed.
        let mut short = guide(true, constrained, false, Some(2)).unwrap();
        feed(&mut short, &[OPEN, id("ab"), CLOSE, id("ye"), id("s")]);
        let mut none = guide(true, constrained, false, Some(2)).unwrap();
        feed(&mut none, &[id("ye"), id("s")]);
    }
    // A marker of several tokens is forced one by one.
    let mut spelled = guide(false, false, true, Some(1)).unwrap();
    feed(&mut spelled, &[id("ab")]);
    for byte in "</think>".bytes() {
        let mask = spelled.mask().unwrap().unwrap();
        assert_eq!(mask.tokens().collect::<Vec<_>>(), [BYTES + u32::from(byte)]);
        feed(&mut spelled, &[BYTES + u32::from(byte)]);
    }
    assert_eq!(spelled.mask().unwrap(), None);
    assert!(guide(true, false, true, None).is_none(), "there is nothing to watch");
}

#[test]
fn clones_go_on_by_themselves() {
    let mut first = guide(true, true, false, None).unwrap();
    let mut second = first.clone();
    feed(&mut first, &[id("{"), id("ab")]);
    feed(&mut second, &[id("ye")]);
    assert!(allows(&mut first, id("}")) && !allows(&mut second, id("}")));
    assert!(allows(&mut second, id("s")) && !allows(&mut first, id("s")));
}

#[test]
fn a_model_without_an_end_stops_where_nothing_can_follow() {
    let vocabulary = Arc::new(GrammarVocabulary::of_tokens(tokens(), &[]).unwrap());
    let matcher = vocabulary.compile(&choice(&["yes"])).unwrap();
    let mut guide = Guide::new(Arc::clone(&vocabulary), Some(matcher), ThinkingStart::Free, None).unwrap();
    feed(&mut guide, &[id("ye"), id("s")]);
    assert!(guide.is_complete());
}

#[test]
fn tool_calls_follow_the_schemas_of_their_tools() {
    let tools = [("look \"up\"", random_schema(3)), ("add", random_schema(4)), ("none", Value::Null)].map(
        |(name, parameters)| json!({ "type": "function", "function": { "name": name, "parameters": parameters } }),
    );
    let calls = |only, parallel| ToolCalls::new(ToolFormat::Hermes.syntax(), &tools, only, parallel);
    let mut most = 0;
    for seed in 0..60 {
        let (only, parallel) = ((seed % 3 == 0).then_some("add"), seed % 2 == 0);
        let constraint = Constraint::ToolCalls(calls(only, parallel).unwrap());
        let matcher = tiny_chat().compile(&constraint).unwrap();
        let (text, _) = random_answer(tiny_chat(), matcher, &mut Random::new(seed));
        let blocks: Vec<&str> = text.split("<tool_call>\n").skip(1).collect();
        most = most.max(blocks.len());
        assert!(!blocks.is_empty() && (parallel || blocks.len() == 1), "{text}");
        for block in blocks {
            let call: Value = serde_json::from_str(block.trim_end().strip_suffix("</tool_call>").unwrap()).unwrap();
            let tool = tools.iter().find(|tool| tool["function"]["name"] == call["name"]).expect("a tool");
            assert!(only.is_none_or(|only| call["name"] == only));
            match &tool["function"]["parameters"] {
                Value::Null => assert!(call["arguments"].is_object()),
                schema => assert_eq!(violation(schema, schema, &call["arguments"]), None),
            }
        }
    }
    assert!(most > 1, "calls are never parallel");
    assert_eq!(calls(Some("other"), true).unwrap_err().status(), Status::InvalidRequest);
    assert_eq!(
        ToolCalls::new(ToolFormat::Hermes.syntax(), &[], None, true).unwrap_err().status(),
        Status::InvalidRequest
    );
    // The marks are tokens of this model, and are used as such.
    let matcher = &mut tiny_chat().compile(&Constraint::ToolCalls(calls(None, true).unwrap())).unwrap();
    assert_eq!(matcher.mask().unwrap().tokens().collect::<Vec<_>>(), [5]);
}

#[test]
fn masks_are_sets_of_tokens() {
    let mut mask = TokenMask::all(70);
    assert_eq!((mask.words().len(), mask.tokens().count()), (3, 70));
    assert!(!mask.allows(70) && !mask.allows(1000));
    mask.forbid(69);
    mask.allow(70);
    assert_eq!(mask.tokens().count(), 69);
    assert!(TokenMask::none(70).is_empty() && !mask.is_empty());
}

#[test]
fn a_grammar_that_comes_again_begins_anew() {
    let vocabulary = vocabulary(true);
    let constraint = choice(&["ab", "yes"]);
    let mut first = vocabulary.compile(&constraint).unwrap();
    let beginning = first.mask().unwrap();
    first.accept(id("ab")).unwrap();
    assert!(first.must_end());
    let mut second = vocabulary.compile(&constraint).unwrap();
    assert_eq!(vocabulary.compiled().len(), 1);
    assert!(!second.must_end());
    let tokens = |mask: &TokenMask| mask.tokens().collect::<Vec<_>>();
    assert_eq!(tokens(&second.mask().unwrap()), tokens(&beginning));
    second.accept(id("ye")).unwrap();
    second.accept(id("s")).unwrap();
    assert!(second.must_end());
    // One that is refused is not kept, and refused again.
    for _ in 0..2 {
        assert!(vocabulary.compile(&Constraint::Regex("(".to_owned())).is_err());
        assert_eq!(vocabulary.compiled().len(), 1);
    }
}

#[test]
fn few_grammars_are_kept_and_the_longest_unused_one_goes() {
    let vocabulary = vocabulary(true);
    let numbered = |number: usize| choice(&[&format!("a{number}")]);
    for number in 0..40 {
        vocabulary.compile(&numbered(number)).unwrap();
        vocabulary.compile(&numbered(0)).unwrap();
    }
    assert_eq!(vocabulary.compiled().len(), 32);
    let kept = |number: usize| {
        let constraint = numbered(number).grammar(|_| None).unwrap();
        vocabulary.compiled().get(&serde_json::to_string(&constraint).unwrap()).is_some()
    };
    assert!(kept(0) && kept(39) && !kept(1));
    // A source that is too long is compiled each time.
    vocabulary.compile(&choice(&[&"a".repeat(70_000)])).unwrap();
    assert_eq!(vocabulary.compiled().len(), 32);
    assert!(kept(39));
}
