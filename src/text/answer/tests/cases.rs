use super::*;
use crate::logged::logged;

const WEATHER: &str = r#"{"city": "Oslo", "days": 2}"#;

/// For each format two calls as its models write them, of `get_weather` and `now`, with text before them where the format
/// has that.
fn examples() -> Vec<(ToolFormat, &'static str)> {
    use ToolFormat::*;
    vec![
        (
            Hermes,
            "Sure.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}\n</tool_call>\n\
             <tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>",
        ),
        (
            Qwen,
            "Sure.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n\
             </parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        ),
        (
            Seed,
            "Sure.\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>Oslo</parameter>\n<parameter=days>2</parameter>\n\
             </function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
        ),
        (
            Glm,
            "Sure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n\
             <arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
        ),
        (
            MiniMax,
            "Sure.\n<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Oslo</parameter>\n\
             <parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"now\">\n</invoke>\n</minimax:tool_call>",
        ),
        (
            DeepSeekDsml,
            "Sure.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n\
             <｜DSML｜parameter name=\"city\" string=\"true\">Oslo</｜DSML｜parameter>\n\
             <｜DSML｜parameter name=\"days\" string=\"false\">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
             <｜DSML｜invoke name=\"now\">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ),
        (
            DeepSeek,
            "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n\
             {\"city\": \"Oslo\", \"days\": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n\
             {}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            DeepSeekV31,
            "Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Oslo\", \"days\": 2}\
             <｜tool▁call▁end｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        (
            Kimi,
            "Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>\
             {\"city\": \"Oslo\", \"days\": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1\
             <|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        ),
        (
            MistralArray,
            "Sure.[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}, \
             {\"name\": \"now\", \"arguments\": {}, \"id\": \"abcdefghi\"}]",
        ),
        (
            Mistral,
            "Sure.[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Oslo\", \"days\": 2}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}",
        ),
        (
            Llama,
            "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Oslo\", \"days\": 2}}; {\"type\": \"function\", \
             \"name\": \"now\", \"parameters\": {}}",
        ),
        (Pythonic, "[get_weather(city=\"Oslo\", days=2), now()]"),
        (Lfm2, "Sure.<|tool_call_start|>[get_weather(city='Oslo', days=2), now()]<|tool_call_end|>"),
        (ToolCode, "Sure.\n```tool_code\nget_weather(city=\"Oslo\", days=2)\nnow()\n```"),
        (
            FunctionGemma,
            "Sure.<start_function_call>call:get_weather{city:<escape>Oslo<escape>,days:2}<end_function_call>\
             <start_function_call>call:now{}<end_function_call>",
        ),
        (
            Gemma,
            "Sure.<|tool_call>call:get_weather{city:<|\"|>Oslo<|\"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>",
        ),
        (
            Harmony,
            "<|channel|>commentary<|message|>Sure.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather \
             <|constrain|>json<|message|>{\"city\": \"Oslo\", \"days\": 2}<|call|><|start|>assistant\
             <|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>",
        ),
    ]
}

/// All of them.
pub(super) fn formats() -> impl Iterator<Item = ToolFormat> {
    examples().into_iter().map(|(format, _)| format)
}

pub(super) fn example(wanted: ToolFormat) -> &'static str {
    examples().into_iter().find(|(format, _)| *format == wanted).unwrap().1
}

#[test]
fn every_format_gives_the_same_calls() {
    for (known, _) in format::SIGNS {
        assert!(formats().any(|format| format == *known), "no example of {known:?}");
    }
    for (format, text) in examples() {
        let answer = parse(format, text);
        assert_eq!(answer.calls(), [("get_weather", WEATHER), ("now", "{}")], "{format:?}");
        assert_eq!(answer.complete, 2, "{format:?}");
        let said = if matches!(format, ToolFormat::Llama | ToolFormat::Pythonic) { "" } else { "Sure." };
        assert_eq!((answer.content.as_str(), answer.reasoning.as_str()), (said, ""), "{format:?}");
    }
}

#[test]
fn arguments_stream_as_they_come() {
    for (format, text) in examples() {
        let mut parser = settings(format).parser(1);
        let (before, _) = text.split_at(text.find("slo").unwrap());
        let mut answer = Answer::default();
        answer.add(parser.push(before));
        assert_eq!(answer.calls(), [("get_weather", "{\"city\": \"O")], "{format:?}");
    }
}

/// The end-of-turn token of many models takes the place of the last mark.
#[test]
fn a_call_needs_no_closing_mark() {
    for (format, text) in examples() {
        let last =
            text.rfind("{}").or_else(|| text.rfind("()").map(|at| at + usize::from(format != ToolFormat::ToolCode)));
        let marks = ["</function>", "</invoke>", "</｜DSML｜invoke>"];
        let end = marks.iter().find_map(|mark| Some(text.rfind(mark)? + mark.len()));
        let end = end.or(last.map(|at| at + 2)).unwrap_or(text.len()).min(text.len());
        let answer = parse(format, &text[..end]);
        assert_eq!(answer.complete, 2, "{format:?}: {}", &text[..end]);
    }
}

#[test]
fn calls_stay_text_without_tools() {
    for (format_, text) in examples().into_iter().filter(|(format, _)| *format != ToolFormat::Harmony) {
        let settings = AnswerSettings::new(format(format_), None, "");
        assert_eq!(read(&settings, [text]), Answer { content: text.to_owned(), ..Answer::default() }, "{format_:?}");
    }
    let settings = AnswerSettings::new(format(ToolFormat::Harmony), None, "");
    let answer = read(&settings, [example(ToolFormat::Harmony)]);
    assert_eq!(answer.content, format!("Sure.\n\n{WEATHER}\n\n{{}}"));
}

#[test]
fn reasoning_and_the_white_space_around_it() {
    let hermes = |prompt: &str, text: &str| {
        let settings = AnswerSettings::new(format(ToolFormat::Hermes), Some(&tools()), prompt);
        let answer = read(&settings, text.split_inclusive(|_| true));
        assert_eq!(read(&settings, [text]), answer);
        (answer.reasoning, answer.content)
    };
    let both = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(hermes("", "<think>\na b\n\nc\n</think>\n\nHello\n"), both("a b\n\nc", "Hello\n"));
    assert_eq!(hermes("assistant\n<think>\n", "\na\n</think>\nHello"), both("a", "Hello"));
    assert_eq!(hermes("<think>", "<think>a</think>b"), both("a", "b"));
    assert_eq!(hermes("<think>\n\n</think>\n\n", "  Hello "), both("", "  Hello "));
    assert_eq!(hermes("", " \n<think></think>  "), both("", ""));
    assert_eq!(hermes("<think>", "cut off "), both("cut off ", ""));
    // Text may be about the mark.
    assert_eq!(hermes("", "a <think> b"), both("", "a <think> b"));
    assert_eq!(hermes("", "a </think> b <thin"), both("", "a </think> b <thin"));
    assert_eq!(hermes("", "a <think>b</think> c"), both("", "a <think>b</think> c"));
    assert_eq!(hermes("", "<think>a</think>\n<think>b</think> c"), both("ab", "c"));
    let text = "<tool_call>{\"name\": \"now\"}</tool_call>\n<think>b</think>";
    assert_eq!(hermes("", text), both("b", ""));
    // A call that a model thinks of is none.
    let text = "<think>use <tool_call>{\"name\": \"now\"}</tool_call></think>x";
    assert_eq!(hermes("", text), both("use <tool_call>{\"name\": \"now\"}</tool_call>", "x"));
    let mistral = parse(ToolFormat::Mistral, "[THINK]why[/THINK]because[TOOL_CALLS]now[ARGS]{}");
    assert_eq!((mistral.reasoning.as_str(), mistral.content.as_str(), mistral.complete), ("why", "because", 1));
    let gemma = parse(ToolFormat::Gemma, "<|channel>thought\nwhy<channel|>because<|channel>thought\nso<channel|>");
    assert_eq!((gemma.reasoning.as_str(), gemma.content.as_str()), ("whyso", "because"));
    // Seed's template opens a note about the budget behind it.
    let settings = AnswerSettings::new(format(ToolFormat::Seed), None, "<seed:think><seed:cot_budget_reflect>");
    let seed = read(&settings, ["a</seed:cot_budget_reflect>\n</seed:think>b"]);
    assert_eq!((seed.reasoning.as_str(), seed.content.as_str()), ("a</seed:cot_budget_reflect>", "b"));
}

#[test]
fn special_tokens_of_calls_end_reasoning() {
    let settings = AnswerSettings::new(format(ToolFormat::Kimi), Some(&tools()), "<think>");
    let answer = read(&settings, ["hm ", example(ToolFormat::Kimi)]);
    assert_eq!((answer.reasoning.as_str(), answer.complete), ("hm Sure.", 2));
}

#[test]
fn a_call_in_reasoning_that_is_not_closed() {
    use ToolFormat::*;
    let read_after_think = |tools_format: ToolFormat, text: &str| {
        let format = format(tools_format);
        let settings = AnswerSettings::new(format, Some(&tools()), format.reasoning.unwrap().open);
        let answer = read(&settings, text.split_inclusive(|_| true));
        assert_eq!(read(&settings, [text]), answer);
        answer
    };
    for tools_format in [Qwen, Seed, Glm, MiniMax, DeepSeekDsml, DeepSeekV31, Kimi] {
        let ReasoningSyntax { open, close } = format(tools_format).reasoning.unwrap();
        // The close that comes late is of the reasoning, and only one is.
        let text = format!("hm {}\n{close}\n{open}so{close}\nDone {close}.", example(tools_format));
        let answer = read_after_think(tools_format, &text);
        assert_eq!(answer.reasoning.replace(char::is_whitespace, ""), "hmSure.so", "{tools_format:?}");
        assert_eq!((answer.content, answer.complete), (format!("Done {close}."), 2), "{tools_format:?}");
    }
    // What only mentions a call is reasoning.
    for (format, text) in [
        (Qwen, "use <tool_call>, <function=now> or <tool_call>\n<function=now> x"),
        (Glm, "use <tool_call> now, or <tool_call>now"),
        (MiniMax, "use <minimax:tool_call> or <minimax:tool_call><invoke name=\"now\">, x"),
    ] {
        let answer = read_after_think(format, &format!("{text}</think>Done."));
        assert_eq!((answer.reasoning.as_str(), answer.content.as_str()), (text, "Done."), "{format:?}");
        assert_eq!(answer.calls(), []);
    }
}

#[test]
fn harmony_channels() {
    let read_after = |prompt: &str, text: &str| {
        let settings = AnswerSettings::new(format(ToolFormat::Harmony), Some(&tools()), prompt);
        let answer = read(&settings, text.split_inclusive(|_| true));
        assert_eq!(read(&settings, [text]), answer);
        (answer.reasoning, answer.content, answer.complete)
    };
    let all = |a: &str, b: &str, calls| (a.to_owned(), b.to_owned(), calls);
    let start = "<|start|>user<|message|>hi<|end|><|start|>assistant";
    let usual = "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello <|x|>.<|return|>";
    assert_eq!(read_after(start, usual), all("Think.", "Hello <|x|>.", 0));
    assert_eq!(read_after(start, "Hello"), all("", "Hello", 0));
    assert_eq!(read_after(&format!("{start}<|channel|>final<|message|>"), "Hello"), all("", "Hello", 0));
    assert_eq!(read_after(&format!("{start}<|channel|>analysis<|message|>"), "Hm"), all("Hm", "", 0));
    // The recipient may come before the channel, and a built-in tool has no namespace.
    let early = " to=functions.now<|channel|>commentary json<|message|>{}";
    assert_eq!(read_after(start, early), all("", "", 1));
    assert_eq!(read_after(start, "<|channel|>commentary to=python<|message|>{\"a\": 1}<|call|>"), all("", "", 1));
    assert_eq!(read_after(start, "<|channel|>commentary to=python<|message|>1+1<|call|>"), all("", "1+1", 0));
    // A header that is cut off is no text, but what only looks like the beginning of one is.
    assert_eq!(read_after(start, "<|channel|>fin"), all("", "", 0));
    assert_eq!(read_after(start, "<|channel|>final<|message|>Hi<|end|><|start|>assistant"), all("", "Hi", 0));
    assert_eq!(read_after(start, "to"), all("", "to", 0));
    assert_eq!(read_after(start, "<|"), all("", "<|", 0));
    // Without text a call is whole only if its end is there.
    let call = "<|channel|>commentary to=functions.now<|message|>";
    assert_eq!(read_after(start, &format!("{call}<|call|>")), all("", "", 1));
    for rest in ["", "<|start|>assistant", "<|channel|>final<|message|>"] {
        assert_eq!(read_after(start, &format!("{call}{rest}")), all("", "", 0));
    }
    // Marks in the strings of arguments.
    let settings = AnswerSettings::new(format(ToolFormat::Harmony), Some(&tools()), start);
    let answer = read(&settings, [call, "{\"a\": \"<|start|>x<|end|>\"}<|call|>"]);
    assert_eq!((answer.calls(), answer.complete), (vec![("now", "{\"a\": \"<|start|>x<|end|>\"}")], 1));
    assert_eq!(
        read_after(start, "<|channel|>a<|message|>x<|end|> y <|start|>z<|end|>w"),
        all("", "x\n\ny \n\nz<|end|>\n\nw", 0)
    );
}

#[test]
fn what_is_malformed_comes_out_as_text() {
    use ToolFormat::*;
    for (format, text) in [
        (Hermes, "<tool_call>\nnot JSON</tool_call>"),
        (Hermes, "<tool_call>{\"name\": 7, \"arguments\": {}}</tool_call>"),
        (Hermes, "<tool_call>{\"arguments\": {}}</tool_call>"),
        (Hermes, "a <tool_call> b"),
        (Hermes, "a <tool_call"),
        (Hermes, "<tool_call>{\"name\": \"f\""),
        (Qwen, "<tool_call>\n<function=f"),
        (Qwen, "<tool_call>\n<fun>x</fun>"),
        (Qwen, "use <function=a b> here"),
        (Qwen, "<tool_call>\n<function=now>\nx"),
        (Glm, "<tool_call>{\"name\": \"f\"}</tool_call>"),
        (MiniMax, "<minimax:tool_call>x"),
        (DeepSeek, "<｜tool▁calls▁begin｜>x"),
        (DeepSeekV31, "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>a b<｜tool▁sep｜>{}"),
        (Kimi, "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        (MistralArray, "[TOOL_CALLS] [7]"),
        (Mistral, "[TOOL_CALLS]f[ARG"),
        (Llama, "{\"name\": \"Bob\", \"age\": 5}"),
        (Llama, "{\"name\": \"Bob\"}"),
        (Llama, "[1] and [2](x)"),
        (Llama, "<|python_tag|>print(1)"),
        (Pythonic, "[f(x)] is a list"),
        (Pythonic, "[f(a"),
        (Pythonic, "[f(abc=foo)]"),
        (Pythonic, "[f(a==b) is"),
        (ToolCode, "```tool_code\n1 + 1\n```"),
        (FunctionGemma, "<start_function_call>f{}"),
        (Gemma, "<|tool_call>call:f g{}"),
    ] {
        let answer = parse(format, text);
        assert_eq!((answer.content.as_str(), answer.calls.len()), (text, 0), "{format:?}");
    }
}

#[test]
fn the_log_warns_of_what_is_malformed_or_cut_off() {
    let warnings = |format, text| logged(|| read(&settings(format), [text])).1;
    for (format, text, warning) in [
        (ToolFormat::Hermes, "<tool_call>\nnot JSON</tool_call>", "a tool call is malformed"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": x", "a tool call is malformed"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"f\"", "the answer ends within a tool call"),
        (ToolFormat::Qwen, "<tool_call>\n<function=f", "the answer ends within a tool call"),
    ] {
        // What is given back is read again, and may begin another one.
        let (said, warning) = (warnings(format, text), format!("{warning}; the rest of it is sent as text"));
        assert!(!said.is_empty() && said.iter().all(|line| *line == warning), "{text}: {said:?}");
    }
    let start = "<|start|>assistant";
    let harmony = AnswerSettings::new(format(ToolFormat::Harmony), Some(&tools()), start);
    let call = |arguments: &str| format!("<|channel|>commentary to=functions.now<|message|>{arguments}");
    let cut = logged(|| read(&harmony, [call("{\"a\": ").as_str()])).1;
    assert_eq!(cut, ["a tool call is malformed or cut off; the rest of it is sent as text"]);
    assert_eq!(logged(|| read(&harmony, [call("{}<|call|>").as_str()])).1, [""; 0]);
    // What is whole, or no call at all, is nothing to warn of.
    for text in ["<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>", "{\"name\": \"Bob\"}"] {
        assert_eq!(warnings(ToolFormat::Hermes, text), [""; 0], "{text}");
    }
    assert_eq!(warnings(ToolFormat::Llama, "{\"name\": \"Bob\"}"), [""; 0]);
}

#[test]
fn the_rest_of_a_call_that_goes_wrong_comes_out_as_text() {
    let answer = parse(ToolFormat::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": x}}</tool_call> y");
    assert_eq!(answer.calls(), [("f", "{\"a\": ")]);
    assert_eq!((answer.content.as_str(), answer.complete), ("x}}</tool_call> y", 0));
    // The next call is still found.
    let text =
        "<tool_call><tool_call>{\"name\": \"f\", \"arguments\": {\"a\": <tool_call>{\"name\": \"now\"}</tool_call>";
    let answer = parse(ToolFormat::Hermes, text);
    assert_eq!(answer.calls(), [("f", "{\"a\": "), ("now", "{}")]);
    assert_eq!((answer.content.as_str(), answer.complete), ("<tool_call>", 1));
    let answer = parse(ToolFormat::Qwen, "<tool_call><function=get_weather><parameter=city>Os</param");
    assert_eq!(answer.calls(), [("get_weather", "{\"city\": \"Os")]);
    assert_eq!((answer.content.as_str(), answer.complete), ("</param", 0));
    let answer = parse(ToolFormat::Qwen, "<tool_call><function=get_weather><parameter=days>\n12");
    assert_eq!((answer.calls(), answer.content.as_str()), (vec![("get_weather", "")], "<parameter=days>\n12"));
    let answer = parse(ToolFormat::Pythonic, "[now(), 5]");
    assert_eq!((answer.calls(), answer.content.as_str(), answer.complete), (vec![("now", "{}")], ", 5]", 1));
    // The character that ends a word is of the rest if the call goes wrong there.
    for (format, text, arguments, rest) in [
        (ToolFormat::Pythonic, "[f(a=1]", "{\"a\": 1", "]"),
        (ToolFormat::Pythonic, "[f(a=1, b=foo)]", "{\"a\": 1", ", b=foo)]"),
        (ToolFormat::Pythonic, "[f(a=[1, b", "{\"a\": [1", ", b"),
        (ToolFormat::Gemma, "<|tool_call>call:f{a}", "{\"a\"", "}"),
        (ToolFormat::Gemma, "<|tool_call>call:f{a:[1}", "{\"a\": [1", "}"),
    ] {
        let answer = parse(format, text);
        assert_eq!((answer.calls(), answer.content.as_str()), (vec![("f", arguments)], rest), "{text}");
    }
    // Nothing of a whole object is text.
    let answer = parse(ToolFormat::Llama, "{\"name\": \"now\", \"parameters\": {}} Done.");
    assert_eq!((answer.content.as_str(), answer.complete), ("Done.", 1));
}

#[test]
fn what_models_get_wrong_and_everybody_understands() {
    let hermes = |text: &str| {
        let answer = parse(ToolFormat::Hermes, text);
        assert_eq!(answer.content, "", "{text}");
        answer.calls.into_iter().map(|(name, arguments)| format!("{name} {arguments}")).collect::<Vec<_>>()
    };
    // A brace too few, the name last, arguments as a string or not at all, several calls in a block, bare line breaks.
    let block = |inner: &str| format!("<tool_call>{inner}</tool_call>");
    assert_eq!(hermes(&block("{\"name\": \"f\", \"arguments\": {\"a\": 1}")), ["f {\"a\": 1}"]);
    assert_eq!(hermes(&block("{\"arguments\": {\"a\": 1}, \"name\": \"f\"}")), ["f {\"a\": 1}"]);
    assert_eq!(hermes(&block("{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}")), ["f {\"a\": 1}"]);
    assert_eq!(hermes(&block("{\"name\": \"f\", \"arguments\": null}")), ["f {}"]);
    assert_eq!(hermes(&block("{\"name\": \"f\"}\n{\"name\": \"g\"}")), ["f {}", "g {}"]);
    assert_eq!(hermes(&block("{\"name\": \"f\", \"arguments\": {\"a\": \"x\ny\"}}")), ["f {\"a\": \"x\\ny\"}"]);
    assert_eq!(
        hermes(&block("{\"name\": \"f\", \"arguments\": {\"a\": \"</tool_call>\"}}")),
        ["f {\"a\": \"</tool_call>\"}"]
    );
    let answer = parse(ToolFormat::Llama, "\n{\"name\": \"f\", \"parameters\": {}}\n");
    assert_eq!((answer.content.as_str(), answer.complete), ("", 1));
    // Qwen3-Coder forgets the opening.
    let answer = parse(ToolFormat::Qwen, "Hm.\n<function=now>\n</function>\n</tool_call>");
    assert_eq!((answer.content.as_str(), answer.complete), ("Hm.", 1));
    let answer = parse(ToolFormat::Qwen, "<function=now></function>\nDone.");
    assert_eq!((answer.content.as_str(), answer.complete), ("Done.", 1));
    // Qwen and Seed forget the end of a value.
    for (open, close) in [("<tool_call>", "</tool_call>"), ("<seed:tool_call>", "</seed:tool_call>")] {
        let format = if open == "<tool_call>" { ToolFormat::Qwen } else { ToolFormat::Seed };
        let text = format!(
            "{open}\n<function=get_weather>\n<parameter=city>\nOs\nlo\n\n<parameter=days>\n2\n</function>\n{close}\nDone."
        );
        let answer = parse(format, &text);
        assert_eq!(answer.calls(), [("get_weather", "{\"city\": \"Os\\nlo\\n\", \"days\": 2}")], "{format:?}");
        assert_eq!((answer.content.as_str(), answer.complete), ("Done.", 1), "{format:?}");
    }
    let text = "<tool_call><function=get_weather><parameter=city>Oslo\n<parameter=days";
    let answer = parse(ToolFormat::Qwen, text);
    assert_eq!(answer.calls(), [("get_weather", "{\"city\": \"Oslo\"")]);
    assert_eq!(answer.content, "<parameter=days");
}

#[test]
fn values_between_tags_keep_their_text() {
    let text = "<tool_call>\n<function=get_weather>\n<parameter=city>\n\n a \"b\"\\\n</parameter\n\n</parameter>\n\
                <parameter=days>\nTrue\n</parameter>\n<parameter=units>\n['m', {\"s\": 1}]\n</parameter>\n\
                <parameter=other>\n12 x\n</parameter>\n</function>\n</tool_call>";
    let answer = parse(ToolFormat::Qwen, text);
    let arguments: Value = serde_json::from_str(&answer.calls[0].1).unwrap();
    let expected =
        json!({"city": "\n a \"b\"\\\n</parameter\n", "days": true, "units": ["m", {"s": 1}], "other": "12 x"});
    assert_eq!(arguments, expected);
    // MiniMax puts no line breaks around them.
    let text = "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">\na\n</parameter>\n</invoke>\n\
                </minimax:tool_call>";
    assert_eq!(parse(ToolFormat::MiniMax, text).calls(), [("get_weather", "{\"city\": \"\\na\\n\"}")]);
}

#[test]
fn ids_are_the_models_own_where_it_has_them() {
    assert_eq!(parse(ToolFormat::Kimi, example(ToolFormat::Kimi)).ids, ["functions.get_weather:0", "functions.now:1"]);
    // A name alone is no id: two calls would have the same.
    let call = "<|tool_call_begin|>functions.now<|tool_call_argument_begin|>{}<|tool_call_end|>";
    let kimi =
        parse(ToolFormat::Kimi, &format!("<|tool_calls_section_begin|>{call}{call}<|tool_calls_section_end|>")).ids;
    assert!(kimi.len() == 2 && kimi[0] != kimi[1], "{kimi:?}");
    let mistral = parse(ToolFormat::Mistral, example(ToolFormat::Mistral)).ids;
    assert_eq!((mistral[0].len(), mistral[1].as_str()), (9, "abcdefghi"));
    let common = parse(ToolFormat::Hermes, example(ToolFormat::Hermes)).ids;
    assert!(common.iter().all(|id| id.starts_with("call_")) && common[0] != common[1]);
}

#[test]
fn deep_arguments_are_malformed() {
    let call = |depth: usize| {
        let nested = format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth));
        parse(ToolFormat::Hermes, &format!("<tool_call>{{\"name\": \"f\", \"arguments\": {nested}}}</tool_call>"))
            .complete
    };
    assert_eq!((call(100), call(101), call(100_000)), (1, 0, 0));
}

#[test]
fn arguments_are_what_serde_reads() {
    let lone = parse(
        ToolFormat::Hermes,
        "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"\\ud83d!\", \"b\": \"\\ud83d\\ude00\"}}</tool_call>",
    );
    assert_eq!(lone.calls(), [("f", "{\"a\": \"\u{fffd}!\", \"b\": \"😀\"}")]);
    assert_eq!(lone.complete, 1);
    let large = parse(ToolFormat::Hermes, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1e999}}");
    assert_eq!((large.calls(), large.content.as_str(), large.complete), (vec![("f", "{\"a\": 1")], "e999}}", 0));
}
