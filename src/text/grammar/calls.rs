//! Grammars of tool calls, in any of the ways that models write them, alone or beside another form of answer.

use serde_json::{Value, json};

use super::arguments;
use super::rules::{Rules, string};
use crate::error::{Error, Result};
use crate::text::answer::{Arguments, CallSyntax};

/// Calls that an answer may have at most.
const MAX_CALLS: usize = 16;
/// Of a tool.
const MAX_NAME_BYTES: usize = 256;
/// The number of a call within its conversation.
const CALL_NUMBER: &str = "/0|[1-9][0-9]{0,3}/";

/// Answers that call tools.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCalls {
    /// How calls are written.
    pub syntax: CallSyntax,
    /// Name of each function that may be called, and the JSON schema of its arguments.
    pub functions: Vec<(String, Value)>,
    /// Whether there may be several.
    pub parallel: bool,
    /// Whether the first must begin with an opening, since an answer may be something else.
    pub marked: bool,
}

impl ToolCalls {
    /// Of OpenAI's tool definitions; of all of them, or of the function `only`.
    pub fn new(syntax: &CallSyntax, tools: &[Value], only: Option<&str>, parallel: bool) -> Result<Self> {
        let mut functions = Vec::new();
        for tool in tools {
            let function = tool.get("function").unwrap_or(tool);
            let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
            if name.is_empty() || name.len() > MAX_NAME_BYTES {
                return Err(Error::invalid_request(format!("the name of a tool has 1 to {MAX_NAME_BYTES} bytes")));
            }
            if only.is_none_or(|only| only == name) {
                functions.push((name.to_owned(), schema_of(function.get("parameters"))));
            }
        }
        match (functions.is_empty(), only) {
            (false, _) => Ok(Self { syntax: *syntax, functions, parallel, marked: false }),
            (true, Some(only)) => Err(Error::invalid_request(format!("there is no tool {only:?} to be called"))),
            (true, None) => Err(Error::invalid_request("there are no tools to be called")),
        }
    }

    /// The same where an answer may also be something else: calls then begin with a mark that nothing else begins with.
    pub fn marked(self) -> Self {
        Self { marked: true, ..self }
    }

    /// What an answer of calls begins with, if it is marked.
    pub fn opening(&self) -> &'static str {
        self.syntax.openings.first().copied().unwrap_or_default()
    }

    /// Adds the rule `calls`, and those that it is made of.
    pub(super) fn add(&self, rules: &mut Rules<'_>) -> Result<()> {
        let CallSyntax { open, before_name, after_name, after_arguments, between, close, .. } = self.syntax;
        let opening = self.opening();
        let mark = if self.marked && !open.starts_with(opening) && !before_name.starts_with(opening) {
            rules.literal(opening)
        } else {
            String::new()
        };
        // What may follow the same place is one literal each: the lexer takes the longest that fits, and a line break by itself
        // would be the beginning of the end.
        let first = rules.literal(&format!("{open}{before_name}"));
        let more = match self.parallel {
            true => format!("({} call){{0,{}}}", rules.literal(&format!("{between}{before_name}")), MAX_CALLS - 1),
            false => String::new(),
        };
        rules.add("calls", &format!("{mark} {first} call {more} {}", rules.literal(close)));
        let names = (0..self.functions.len()).map(|at| format!("call_{at}")).collect::<Vec<_>>();
        rules.add("call", &names.join(" | "));
        let number = self.syntax.index_before_arguments.map(|mark| format!("{} {CALL_NUMBER}", string(mark)));
        for (rule, (function, schema)) in names.iter().zip(&self.functions) {
            let arguments = arguments::add(rules, rule, schema, self.syntax.arguments)
                .map_err(|error| error.context(format!("the tool {function:?}")))?;
            // A name may hold what JSON has to escape where it stands within quotes.
            let quoted = string(function);
            let name = if before_name.ends_with('"') && self.syntax.arguments == Arguments::Json {
                &quoted[1..quoted.len() - 1]
            } else {
                function.as_str()
            };
            let number = number.as_deref().unwrap_or_default();
            let (after, tail) = (rules.literal(after_name), rules.literal(after_arguments));
            rules.add(rule, &format!("{} {number} {after} {arguments} {tail}", string(name)));
        }
        Ok(())
    }
}

/// The schema of a function's arguments: any object where it has none.
fn schema_of(parameters: Option<&Value>) -> Value {
    match parameters {
        None | Some(Value::Null) => json!({ "type": "object" }),
        Some(Value::Object(schema)) if !schema.contains_key("type") => {
            let mut schema = schema.clone();
            schema.insert("type".to_owned(), json!("object"));
            Value::Object(schema)
        }
        Some(schema) => schema.clone(),
    }
}
