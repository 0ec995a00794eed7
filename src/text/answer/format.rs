//! How a model marks reasoning and tool calls in its answers.

use super::calls::{CallReader, is_name};
use super::ids::IdStyle;
use super::{gemma, hermes, llama, mistral, pythonic, sections, tags};

/// How a model marks what of an answer is not for the user; decided once, from its chat template and vocabulary.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnswerFormat {
    /// `None` if the model does not think, or does not mark it.
    pub reasoning: Option<ReasoningSyntax>,
    /// `None` if the model knows no tools, or its way of calling them is not known.
    pub tools: Option<ToolFormat>,
}

/// What stands around reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningSyntax {
    /// Before it; a template may end the prompt with this.
    pub open: &'static str,
    /// After it.
    pub close: &'static str,
}

/// The ways to write tool calls, each named after its first or best known user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`.
    Hermes,
    /// `<tool_call><function=f><parameter=k>v</parameter></function></tool_call>`.
    Qwen,
    /// The same in `<seed:tool_call>`.
    Seed,
    /// `<tool_call>f`, `<arg_key>k</arg_key><arg_value>v</arg_value>`, `</tool_call>`.
    Glm,
    /// `<minimax:tool_call><invoke name="f"><parameter name="k">v</parameter></invoke></minimax:tool_call>`.
    MiniMax,
    /// DeepSeek V3.2: the same shape with `<｜DSML｜...>` tags that say whether a value is a string.
    DeepSeekDsml,
    /// DeepSeek V3 and R1: special tokens and a fenced JSON block.
    DeepSeek,
    /// DeepSeek V3.1: special tokens and JSON.
    DeepSeekV31,
    /// Kimi K2: special tokens, ids of its own, JSON.
    Kimi,
    /// `[TOOL_CALLS][{"name": "f", "arguments": {...}}]`.
    MistralArray,
    /// `[TOOL_CALLS]f[ARGS]{...}`.
    Mistral,
    /// `{"name": "f", "parameters": {...}}` as the whole answer, or behind `<|python_tag|>`.
    Llama,
    /// `[f(a=1), g(b="x")]` as the whole answer.
    Pythonic,
    /// The same between special tokens.
    Lfm2,
    /// Gemma 3: Python calls in a block fenced as `tool_code`.
    ToolCode,
    /// `<start_function_call>call:f{k:<escape>v<escape>}<end_function_call>`.
    FunctionGemma,
    /// Gemma 4: `<|tool_call>call:f{k:<|"|>v<|"|>}<tool_call|>`.
    Gemma,
    /// gpt-oss: messages in channels, calls as messages to `functions.f`.
    Harmony,
}

/// How arguments are written within a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arguments {
    /// A JSON object.
    Json,
    /// Each by itself between tags: strings as they are, other values as JSON.
    Tagged {
        /// Before a key.
        before_key: &'static str,
        /// Between a key and its value.
        after_key: &'static str,
        /// The same where the value is no string, if that is written otherwise.
        after_other_key: Option<&'static str>,
        /// After a value.
        after_value: &'static str,
        /// What a string cannot have in it: it would end there.
        ends: &'static [&'static str],
        /// A line break on each side of a value is not of it.
        lines: bool,
    },
    /// `key=value` with commas, values as Python literals.
    Python,
    /// `{key:value}`, strings between two of the delimiter, other values as JSON.
    Gemma {
        /// Stands on both sides of strings.
        delimiter: &'static str,
    },
}

/// How a block of calls is written: `open`, then for each call `before_name`, the name, `after_name`, the arguments,
/// `after_arguments`, with `between` between them, then `close`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallSyntax {
    /// What tells a parser that a block begins; the first is how the model's template writes it.
    pub openings: &'static [&'static str],
    /// Characters that begin a block if they are the first of an answer.
    pub starts: &'static [char],
    /// Before the first call.
    pub open: &'static str,
    /// Before a name.
    pub before_name: &'static str,
    /// Before the call's number within the conversation, which follows the name in some formats.
    pub index_before_arguments: Option<&'static str>,
    /// Between a name and the arguments.
    pub after_name: &'static str,
    /// How arguments are written.
    pub arguments: Arguments,
    /// After the arguments.
    pub after_arguments: &'static str,
    /// Between calls.
    pub between: &'static str,
    /// After the last call.
    pub close: &'static str,
    /// Further marks within a block that may be special tokens.
    pub marks: &'static [&'static str],
    /// Whether a call ends reasoning that was not closed: no model writes one there but to make it.
    pub ends_reasoning: bool,
}

impl CallSyntax {
    /// Nothing but JSON arguments: what the formats fill in.
    pub(super) const JSON: Self = Self {
        openings: &[],
        starts: &[],
        open: "",
        before_name: "",
        index_before_arguments: None,
        after_name: "",
        arguments: Arguments::Json,
        after_arguments: "",
        between: "",
        close: "",
        marks: &[],
        ends_reasoning: false,
    };
}

/// What in a chat template tells a format; the first that fits wins.
pub(super) static SIGNS: &[(ToolFormat, &[&str])] = &[
    (ToolFormat::Harmony, &["<|channel|>", "<|message|>"]),
    (ToolFormat::Kimi, &["<|tool_call_begin|>"]),
    (ToolFormat::DeepSeekDsml, &["｜DSML｜"]),
    (ToolFormat::DeepSeek, &["<｜tool▁calls▁begin｜>", "```json"]),
    (ToolFormat::DeepSeekV31, &["<｜tool▁calls▁begin｜>"]),
    (ToolFormat::MiniMax, &["<minimax:tool_call>"]),
    (ToolFormat::MiniMax, &["minimax:", "<invoke name="]),
    (ToolFormat::Glm, &["<arg_key>"]),
    (ToolFormat::Seed, &["seed:tool_call", "<function="]),
    (ToolFormat::Qwen, &["<function=", "<parameter="]),
    (ToolFormat::Gemma, &["<|tool_call>"]),
    (ToolFormat::FunctionGemma, &["<start_function_call>"]),
    (ToolFormat::Lfm2, &["<|tool_call_start|>"]),
    (ToolFormat::Lfm2, &["<|tool_list_start|>"]),
    (ToolFormat::Mistral, &["[TOOL_CALLS]", "[ARGS]"]),
    (ToolFormat::MistralArray, &["[TOOL_CALLS]"]),
    (ToolFormat::Hermes, &["<tool_call>"]),
    (ToolFormat::Llama, &["\"parameters\": dictionary"]),
    (ToolFormat::Llama, &["<|python_tag|>"]),
    (ToolFormat::Pythonic, &["[func_name1("]),
    (ToolFormat::ToolCode, &["<start_of_turn>"]),
];

pub(super) const THINK: ReasoningSyntax = ReasoningSyntax { open: "<think>", close: "</think>" };

/// Marks of reasoning; a template or a vocabulary that has one of them tells.
static REASONING: &[ReasoningSyntax] = &[
    THINK,
    ReasoningSyntax { open: "[THINK]", close: "[/THINK]" },
    ReasoningSyntax { open: "<seed:think>", close: "</seed:think>" },
    ReasoningSyntax { open: "<|channel>thought\n", close: "<channel|>" },
];

impl AnswerFormat {
    /// The format of a model with this chat template (the texts of all its templates, if it has several); `has_token` says
    /// whether its vocabulary has a token of this spelling.
    pub fn detect(template: &str, has_token: impl Fn(&str) -> bool) -> Self {
        let fits = |signs: &[&str]| signs.iter().all(|sign| template.contains(sign));
        let known = SIGNS.iter().find(|(_, signs)| fits(signs)).map(|(format, _)| *format);
        // Templates of some Mistral models leave their marks to the tokenizer.
        let mistral = || (has_token("[TOOL_CALLS]") && has_token("[ARGS]")).then_some(ToolFormat::Mistral);
        let tools = known.or_else(mistral);
        let marked = |syntax: &&ReasoningSyntax| {
            let first = syntax.open.lines().next().unwrap_or_default();
            template.contains(first) || template.contains(syntax.close) || has_token(syntax.open)
        };
        let reasoning = match tools {
            Some(ToolFormat::Harmony) => Some(ReasoningSyntax {
                open: "<|channel|>analysis<|message|>",
                close: "<|end|><|start|>assistant<|channel|>final<|message|>",
            }),
            _ => REASONING.iter().find(marked).copied(),
        };
        Self { reasoning, tools }
    }

    /// Texts of the special tokens that a parser has to see, where the model has them as special tokens. With `tools` also
    /// those of calls.
    pub fn marks(&self, tools: bool) -> impl Iterator<Item = &'static str> {
        const HARMONY: &[&str] =
            &["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"];
        let is_harmony = self.tools == Some(ToolFormat::Harmony);
        let reasoning =
            self.reasoning.filter(|_| !is_harmony).map(|r| [r.open.lines().next().unwrap_or_default(), r.close]);
        let syntax = self.tools.filter(|_| tools && !is_harmony).map(ToolFormat::syntax);
        let calls = syntax.into_iter().flat_map(|syntax| syntax.openings.iter().chain(syntax.marks));
        let harmony = if is_harmony { HARMONY } else { &[] };
        // The mark of a channel is a token of its own, its name is not.
        let channel = reasoning.filter(|marks| marks[0].starts_with("<|channel>")).map(|_| "<|channel>");
        reasoning.into_iter().flatten().chain(channel).chain(calls.copied()).chain(harmony.iter().copied())
    }
}

impl ToolFormat {
    /// How calls are written, for parsers and for grammars.
    pub fn syntax(self) -> &'static CallSyntax {
        match self {
            Self::Hermes => &hermes::SYNTAX,
            Self::Qwen => &tags::QWEN_SYNTAX,
            Self::Seed => &tags::SEED_SYNTAX,
            Self::Glm => &tags::GLM_SYNTAX,
            Self::MiniMax => &tags::MINIMAX_SYNTAX,
            Self::DeepSeekDsml => &tags::DSML_SYNTAX,
            Self::DeepSeek => &sections::DEEPSEEK_SYNTAX,
            Self::DeepSeekV31 => &sections::DEEPSEEK_V31_SYNTAX,
            Self::Kimi => &sections::KIMI_SYNTAX,
            Self::MistralArray => &mistral::ARRAY,
            Self::Mistral => &mistral::NAMED,
            Self::Llama => &llama::SYNTAX,
            Self::Pythonic => &pythonic::SYNTAX,
            Self::Lfm2 => &pythonic::LFM2_SYNTAX,
            Self::ToolCode => &pythonic::FENCED_SYNTAX,
            Self::FunctionGemma => &gemma::FUNCTION_GEMMA_SYNTAX,
            Self::Gemma => &gemma::GEMMA_SYNTAX,
            Self::Harmony => &super::harmony::SYNTAX,
        }
    }

    /// Whether a call of a tool of this name is read as one.
    pub fn may_call(self, name: &str) -> bool {
        let letters = |c: char| c.is_alphanumeric() || "_.-".contains(c);
        let python = self.syntax().arguments == Arguments::Python;
        is_name(name)
            && !(python && (name.starts_with(|c: char| !c.is_alphabetic() && c != '_') || !name.chars().all(letters)))
    }

    /// Reads the block that begins with the opening of this index, or with a first character.
    pub(super) fn reader(self, start: BlockStart) -> Option<Box<dyn CallReader>> {
        let opening = |index| start == BlockStart::Opening(index);
        Some(match self {
            Self::Hermes => Box::new(hermes::Hermes::new()),
            Self::Qwen => Box::new(tags::TagReader::new(&tags::QWEN, opening(1))),
            Self::Seed => Box::new(tags::TagReader::new(&tags::SEED, opening(1))),
            Self::Glm => Box::new(tags::TagReader::new(&tags::GLM, false)),
            Self::MiniMax => Box::new(tags::TagReader::new(&tags::MINIMAX, false)),
            Self::DeepSeekDsml if opening(1) => Box::new(tags::TagReader::new(&tags::DSML_TOOLS, false)),
            Self::DeepSeekDsml => Box::new(tags::TagReader::new(&tags::DSML, false)),
            Self::DeepSeek | Self::DeepSeekV31 => Box::new(sections::SectionReader::new(&sections::DEEPSEEK)),
            Self::Kimi => Box::new(sections::SectionReader::new(&sections::KIMI)),
            Self::MistralArray | Self::Mistral => Box::new(mistral::Mistral::new()),
            Self::Llama if start == BlockStart::First('[') => Box::new(pythonic::Pythonic::new(true, None)),
            Self::Llama => Box::new(llama::Llama::new()),
            Self::Pythonic if opening(0) => Box::new(pythonic::Pythonic::new(true, Some("<|python_end|>"))),
            Self::Pythonic => Box::new(pythonic::Pythonic::new(true, None)),
            Self::Lfm2 => Box::new(pythonic::Pythonic::new(true, Some("<|tool_call_end|>"))),
            Self::ToolCode => Box::new(pythonic::Pythonic::new(false, Some("```"))),
            Self::FunctionGemma => Box::new(gemma::GemmaCall::new(&gemma::FUNCTION_GEMMA, "<end_function_call>")),
            Self::Gemma => Box::new(gemma::GemmaCall::new(&gemma::GEMMA, "<tool_call|>")),
            Self::Harmony => return None,
        })
    }

    pub(super) fn id_style(self) -> IdStyle {
        match self {
            Self::Mistral | Self::MistralArray => IdStyle::NineLetters,
            _ => IdStyle::Common,
        }
    }
}

/// How a block of calls began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockStart {
    /// With one of the openings.
    Opening(usize),
    /// With the first character of the answer.
    First(char),
}
