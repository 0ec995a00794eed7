//! What a request wants its answer to be: a form, tool calls, or either. Pure.

use serde_json::Value;

use super::request::{ChatInput, Input, Request, ToolChoice};
use crate::error::{Error, Result};
use crate::text::AnswerShape;
use crate::text::answer::{CallSyntax, ToolFormat};
use crate::text::grammar::{Constraint, ToolCalls};

/// What the prompt of a chat ends with in Harmony.
const HARMONY_END: &str = "<|start|>assistant";

/// What the answer has to look like behind its thinking, if that matters, of a model that calls tools in `format`. `prompt`
/// is the text of a chat.
pub fn constraint(format: Option<ToolFormat>, request: &Request, prompt: Option<&str>) -> Result<Option<Constraint>> {
    let Input::Chat(chat) = &request.input else { return Ok(request.constraint.clone()) };
    let constraint = match (shape(format, request), request.constraint.clone()) {
        (AnswerShape::Free, form) => form,
        (AnswerShape::Calls, _) => Some(Constraint::ToolCalls(tool_calls(format, chat)?)),
        (AnswerShape::CallsOrText, None) => None,
        (AnswerShape::CallsOrText, Some(form)) => {
            Some(Constraint::Either(tool_calls(format, chat)?.marked(), Box::new(form)))
        }
    };
    match constraint {
        Some(inner) if format == Some(ToolFormat::Harmony) => {
            if !prompt.is_some_and(|prompt| prompt.ends_with(HARMONY_END)) {
                return Err(Error::unsupported(
                    "a message of Harmony's that the prompt has begun cannot be held to a form",
                ));
            }
            Ok(Some(Constraint::Channels(Box::new(inner), request.thinking_budget)))
        }
        constraint => Ok(constraint),
    }
}

/// What tells calls from other text in the answer.
pub fn shape(format: Option<ToolFormat>, request: &Request) -> AnswerShape {
    let Input::Chat(chat) = &request.input else { return AnswerShape::Free };
    match &chat.tool_choice {
        ToolChoice::Required | ToolChoice::Named(_) => AnswerShape::Calls,
        ToolChoice::Auto if tools(chat).is_empty() || request.constraint.is_none() || format.is_none() => {
            AnswerShape::Free
        }
        ToolChoice::Auto => AnswerShape::CallsOrText,
    }
}

/// Calls of the tools that the request wants.
fn tool_calls(format: Option<ToolFormat>, chat: &ChatInput) -> Result<ToolCalls> {
    let unknown = || Error::unsupported("\"tool_choice\": how this model calls tools is not known");
    let format = format.ok_or_else(unknown)?;
    let harmony = format == ToolFormat::Harmony;
    // The end of a message to a function is the end of the answer.
    let syntax = match format.syntax() {
        syntax if harmony => CallSyntax { after_arguments: "", ..*syntax },
        syntax => *syntax,
    };
    let only = match &chat.tool_choice {
        ToolChoice::Named(name) => Some(name.as_str()),
        ToolChoice::Auto | ToolChoice::Required => None,
    };
    let calls = ToolCalls::new(&syntax, tools(chat), only, chat.parallel_tool_calls && !harmony)?;
    match calls.functions.iter().find(|(name, _)| !format.may_call(name)) {
        Some((name, _)) => Err(Error::invalid_request(format!("no call of a tool {name:?} could be read"))),
        None => Ok(calls),
    }
}

fn tools(chat: &ChatInput) -> &[Value] {
    chat.tools.as_ref().and_then(Value::as_array).map_or(&[], Vec::as_slice)
}
