use super::*;

fn detect(template: &str) -> AnswerFormat {
    AnswerFormat::detect(template, |_| false)
}

#[test]
fn the_templates_of_the_families() {
    use ToolFormat::*;
    for (template, format) in [
        ("{\"name\": <function-name>}\n</tool_call> <tool_call>", Some(Hermes)),
        ("<tool_call>\n<function=example>\n<parameter=p>", Some(Qwen)),
        ("<seed:tool_call>\n<function=example>\n<parameter=p>", Some(Seed)),
        ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>", Some(Glm)),
        ("<minimax:tool_call>\n<invoke name=", Some(MiniMax)),
        ("<｜DSML｜function_calls>", Some(DeepSeekDsml)),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '```json'", Some(DeepSeek)),
        ("'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['function']['name']", Some(DeepSeekV31)),
        ("<|tool_calls_section_begin|><|tool_call_begin|>", Some(Kimi)),
        ("[TOOL_CALLS] [AVAILABLE_TOOLS]", Some(MistralArray)),
        ("[TOOL_CALLS]' + name + '[ARGS]", Some(Mistral)),
        ("{\"name\": function name, \"parameters\": dictionary of argument name", Some(Llama)),
        ("put it in the format of [func_name1(params_name1=", Some(Pythonic)),
        ("<|tool_list_start|>", Some(Lfm2)),
        ("<start_of_turn>model", Some(ToolCode)),
        ("<start_of_turn>developer <start_function_call>call:", Some(FunctionGemma)),
        ("<|turn>model <|tool_call>call:", Some(Gemma)),
        ("<|start|>assistant<|channel|>final<|message|>", Some(Harmony)),
        ("<|im_start|>{{ role }}", None),
    ] {
        assert_eq!(detect(template).tools, format, "{template}");
    }
}

#[test]
fn reasoning_is_told_by_template_or_vocabulary() {
    let open = |format: AnswerFormat| format.reasoning.map(|r| r.open);
    assert_eq!(open(detect("content.split('</think>')")), Some("<think>"));
    assert_eq!(open(AnswerFormat::detect("", |token| token == "<think>")), Some("<think>"));
    assert_eq!(open(AnswerFormat::detect("", |token| token == "[THINK]")), Some("[THINK]"));
    assert_eq!(open(detect("no marks")), None);
    assert_eq!(AnswerFormat::detect("", |token| token.starts_with('[')).tools, Some(ToolFormat::Mistral));
}

/// A call written by the syntax, as a grammar would force it, is the call that the parser reads.
#[test]
fn the_syntax_writes_what_the_parser_reads() {
    for format in super::cases::formats() {
        let syntax = format.syntax();
        let (text, number) = match syntax.arguments {
            Arguments::Json => ("{\"city\": \"Oslo\", \"days\": 2}".to_owned(), ""),
            Arguments::Tagged { before_key, after_key, after_value, .. } => {
                let value = |key: &str, value: &str| format!("{before_key}{key}{after_key}{value}{after_value}");
                (value("city", "Oslo") + &value("days", "2"), "")
            }
            Arguments::Python => ("city=\"Oslo\", days=2".to_owned(), ""),
            Arguments::Gemma { delimiter } => (format!("{{city:{delimiter}Oslo{delimiter},days:2}}"), ""),
        };
        let call = |index: usize| {
            let number = syntax.index_before_arguments.map_or(number.to_owned(), |mark| format!("{mark}{index}"));
            let CallSyntax { before_name, after_name, after_arguments, .. } = syntax;
            format!("{before_name}get_weather{number}{after_name}{text}{after_arguments}")
        };
        let answer = format!("{}{}{}{}{}", syntax.open, call(0), syntax.between, call(1), syntax.close);
        let answer = if format == ToolFormat::Harmony { call(0) + "<|start|>assistant" + &call(1) } else { answer };
        let answer = parse(format, &answer);
        assert_eq!((answer.complete, answer.content.as_str()), (2, ""), "{format:?}");
        for (name, arguments) in answer.calls() {
            let arguments: Value = serde_json::from_str(arguments).unwrap();
            let days = if format == ToolFormat::DeepSeekDsml { json!("2") } else { json!(2) };
            assert_eq!((name, arguments), ("get_weather", json!({"city": "Oslo", "days": days})), "{format:?}");
        }
    }
}

/// Every special-looking mark that the examples show is one that the detokeniser is asked to keep.
#[test]
fn marks_cover_the_examples() {
    for tools in super::cases::formats() {
        let marks: Vec<_> = format(tools).marks(true).collect();
        let mut rest = super::cases::example(tools).to_owned();
        marks.iter().for_each(|mark| rest = rest.replace(mark, ""));
        let left =
            ["<|", "<｜", "[TOOL", "[ARGS", "_function_call>", "<escape>", "|>"].into_iter().find(|m| rest.contains(m));
        assert_eq!(left, None, "{tools:?}: {rest}");
        assert!(format(tools).marks(false).count() < marks.len() || tools == ToolFormat::Harmony, "{tools:?}");
    }
}
