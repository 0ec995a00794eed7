//! From the tokens of a sequence to the pieces of its answer. Pure.

use std::collections::HashSet;
use std::sync::Arc;

use super::events::{DeltaKind, ToolCallPart};
use crate::error::Result;
use crate::text::{AnswerParser, AnswerPart, AnswerSettings, Detokenizer, StopMatcher, TextModel, Tokenizer};

/// How the answers to a request are read.
#[derive(Debug, Clone)]
pub struct AnswerPlan {
    /// How the model marks reasoning and calls.
    pub settings: AnswerSettings,
    /// Special tokens that are such marks.
    pub kept: Arc<HashSet<u32>>,
    /// An answer may have several calls; else it ends with the first.
    pub parallel_calls: bool,
    /// Makes the ids of calls.
    pub seed: u64,
}

impl AnswerPlan {
    /// `None` if the model marks nothing that the request wants to know apart.
    pub fn new(model: &TextModel, settings: AnswerSettings, parallel_calls: bool, seed: u64) -> Option<Self> {
        let tokenizer = model.tokenizer().ok()?;
        let ids = settings.marks().filter_map(|mark| tokenizer.token_id(mark)).filter(|id| tokenizer.is_special(*id));
        let kept = Arc::new(ids.collect());
        let has_marks = settings.marks().next().is_some();
        has_marks.then_some(Self { settings, kept, parallel_calls, seed })
    }
}

/// The text of one answer.
#[derive(Debug)]
pub struct AnswerText {
    model: Arc<TextModel>,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    parser: Option<AnswerParser>,
    parallel_calls: bool,
    /// Of the last piece.
    kind: DeltaKind,
    reasoning_tokens: usize,
}

/// What a token adds to an answer.
#[derive(Debug, Default)]
pub struct Pieces {
    /// At least one, the first of which may be empty.
    pub pieces: Vec<(DeltaKind, String)>,
    /// Whether the answer ends.
    pub ends: bool,
}

impl AnswerText {
    /// For the answer number `choice` of a request.
    pub fn new(model: Arc<TextModel>, stop: StopMatcher, plan: Option<&AnswerPlan>, choice: usize) -> Self {
        let kept = plan.map(|plan| Arc::clone(&plan.kept)).unwrap_or_default();
        let parser = plan.map(|plan| plan.settings.parser(plan.seed.wrapping_add(choice as u64)));
        let thinks = parser.as_ref().is_some_and(AnswerParser::is_reasoning);
        Self {
            model,
            detokenizer: Detokenizer::keeping(true, kept),
            stop,
            parser,
            parallel_calls: plan.is_none_or(|plan| plan.parallel_calls),
            kind: if thinks { DeltaKind::Reasoning } else { DeltaKind::Text },
            reasoning_tokens: 0,
        }
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> Result<Pieces> {
        let piece = self.detokenizer.push(self.model.tokenizer()?, token)?;
        let outcome = self.stop.push(piece);
        let thought = self.is_reasoning();
        let mut pieces = self.parse(outcome.emit);
        self.reasoning_tokens += usize::from(thought || self.is_reasoning());
        if pieces.is_empty() {
            pieces.push((self.kind.clone(), String::new()));
        }
        let last_call = !self.parallel_calls && self.complete_calls() > 0;
        Ok(Pieces { pieces, ends: outcome.matched.is_some() || last_call })
    }

    /// The answer has ended: what was held back because a character, a stop string or a mark might have followed.
    pub fn finish(&mut self) -> Vec<(DeltaKind, String)> {
        let mut tail = String::new();
        if self.stop.matched().is_none() {
            let rest = self.model.tokenizer().and_then(|tokenizer| self.detokenizer.finish(tokenizer));
            let outcome = self.stop.push(rest.unwrap_or_default());
            tail = outcome.emit;
            if outcome.matched.is_none() {
                tail.push_str(&self.stop.finish());
            }
        }
        let mut pieces = self.parse(tail);
        if let Some(parser) = &mut self.parser {
            pieces.extend(parser.finish().into_iter().map(delta));
        }
        pieces
    }

    /// The stop string that ended it.
    pub fn stopped_by(&self) -> Option<&str> {
        self.stop.matched_text()
    }

    /// The model's tokenizer.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.model.tokenizer().ok()
    }

    /// Tool calls that are whole.
    pub fn complete_calls(&self) -> usize {
        self.parser.as_ref().map_or(0, AnswerParser::complete_calls)
    }

    /// Tokens of reasoning so far.
    pub fn reasoning_tokens(&self) -> usize {
        self.reasoning_tokens
    }

    fn is_reasoning(&self) -> bool {
        self.parser.as_ref().is_some_and(AnswerParser::is_reasoning)
    }

    fn parse(&mut self, text: String) -> Vec<(DeltaKind, String)> {
        let pieces: Vec<_> = match &mut self.parser {
            Some(parser) => parser.push(&text).into_iter().map(delta).collect(),
            None if text.is_empty() => Vec::new(),
            None => vec![(DeltaKind::Text, text)],
        };
        if let Some((kind, _)) = pieces.last() {
            self.kind = kind.clone();
        }
        pieces
    }
}

fn delta(part: AnswerPart) -> (DeltaKind, String) {
    match part {
        AnswerPart::Content(text) => (DeltaKind::Text, text),
        AnswerPart::Reasoning(text) => (DeltaKind::Reasoning, text),
        AnswerPart::Call { index, id, name, arguments } => {
            (DeltaKind::ToolCall(ToolCallPart { index, id, name }), arguments)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    const CALLS: &str = "<think>\nhm\n</think>\nSure.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>\n\
                         <tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>";

    fn model() -> Arc<TextModel> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-chat");
        Arc::new(TextModel::load(&folder).unwrap())
    }

    fn plan(model: &TextModel, prompt: &str, parallel_calls: bool) -> Option<AnswerPlan> {
        let tools = json!([{"name": "f"}]);
        let settings = AnswerSettings::new(model.answer_format(), Some(&tools), prompt);
        AnswerPlan::new(model, settings, parallel_calls, 1)
    }

    /// What comes out of an answer, pieces of one kind joined, and how many of its tokens were read.
    fn read(text: &mut AnswerText, answer: &str) -> (Vec<(DeltaKind, String)>, usize) {
        let (mut pieces, mut count) = (Vec::<(DeltaKind, String)>::new(), 0);
        let mut add = |new: Vec<(DeltaKind, String)>| {
            for (kind, text) in new {
                match pieces.last_mut() {
                    Some((last, all)) if *last == kind => all.push_str(&text),
                    _ => pieces.push((kind, text)),
                }
            }
        };
        for id in text.model.clone().tokenizer().unwrap().encode(answer, false).unwrap() {
            let out = text.push(id).unwrap();
            assert!(!out.pieces.is_empty());
            add(out.pieces);
            count += 1;
            if out.ends {
                break;
            }
        }
        add(text.finish());
        (pieces, count)
    }

    fn shape(pieces: &[(DeltaKind, String)]) -> Vec<String> {
        let kind = |kind: &DeltaKind| match kind {
            DeltaKind::Text => "text".to_owned(),
            DeltaKind::Reasoning => "reasoning".to_owned(),
            DeltaKind::ToolCall(call) => format!("{} {}", call.index, call.name),
        };
        pieces.iter().map(|(k, text)| format!("{}: {text}", kind(k))).collect()
    }

    #[test]
    fn tokens_become_pieces() {
        let model = model();
        let stop = StopMatcher::new::<&str>(&[]).unwrap();
        let plan = plan(&model, "", true);
        let mut text = AnswerText::new(Arc::clone(&model), stop, plan.as_ref(), 0);
        let (pieces, count) = read(&mut text, CALLS);
        assert_eq!(shape(&pieces[1..]), ["reasoning: hm", "text: Sure.", "0 f: {\"a\": 1}", "1 g: {}"]);
        assert_eq!(text.complete_calls(), 2);
        let thought = model.tokenizer().unwrap().encode("<think>\nhm\n</think>", false).unwrap().len();
        assert_eq!((text.reasoning_tokens(), count > thought), (thought, true));
    }

    #[test]
    fn one_call_ends_an_answer_that_may_have_only_one() {
        let model = model();
        let stop = StopMatcher::new::<&str>(&[]).unwrap();
        let mut text = AnswerText::new(Arc::clone(&model), stop, plan(&model, "<think>\n", false).as_ref(), 0);
        let (pieces, count) = read(&mut text, &CALLS[8..]);
        assert_eq!(shape(&pieces), ["reasoning: hm", "text: Sure.", "0 f: {\"a\": 1}"]);
        assert!(count < model.tokenizer().unwrap().encode(&CALLS[8..], false).unwrap().len());
    }

    #[test]
    fn stop_strings_act_on_what_the_model_wrote() {
        let model = model();
        let stop = StopMatcher::new(&["}}"]).unwrap();
        let mut text = AnswerText::new(Arc::clone(&model), stop, plan(&model, "", true).as_ref(), 0);
        let (pieces, _) = read(&mut text, CALLS);
        assert_eq!(shape(&pieces[1..]), ["reasoning: hm", "text: Sure.", "0 f: {\"a\": 1"]);
        assert_eq!(text.complete_calls(), 0);
    }

    #[test]
    fn without_a_plan_all_is_text() {
        let stop = StopMatcher::new::<&str>(&[]).unwrap();
        let mut text = AnswerText::new(model(), stop, None, 0);
        assert_eq!(shape(&read(&mut text, CALLS).0), [format!("text: {CALLS}")]);
        assert_eq!((text.reasoning_tokens(), text.complete_calls()), (0, 0));
    }
}
