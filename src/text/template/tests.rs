use serde_json::{Value as Json, json};

use super::*;

fn templates(source: &str) -> ChatTemplates {
    let clock = || LocalTime { year: 2024, month: 7, day: 4, hour: 15, minute: 5, second: 9 };
    ChatTemplates::new([("default".to_owned(), source.to_owned())].into(), SpecialTokens::default(), clock).unwrap()
}

fn render(source: &str, messages: Json) -> Result<String> {
    templates(source).render(&ChatInput::new(&messages))
}

fn hello() -> Json {
    json!([{"role": "user", "content": "hi"}])
}

#[test]
fn unusable_input_is_an_invalid_request() {
    let deep = (0..200).fold(json!(1), |inner, _| json!([inner]));
    let reserved = json!({"messages": []});
    let messages = hello();
    let with = |change: &dyn Fn(&mut ChatInput<'_>)| {
        let templates = templates("x");
        let mut input = ChatInput::new(&messages);
        change(&mut input);
        templates.render(&input).unwrap_err().status()
    };
    for bad in [json!([]), json!({}), json!(null), json!(["text"]), json!([{"role": "user", "content": deep}])] {
        assert_eq!(render("x", bad).unwrap_err().status(), Status::InvalidRequest);
    }
    let (text, number, kwargs) = (json!("text"), json!([1]), reserved.as_object().unwrap().clone());
    // The changes borrow only what lives as long as the test.
    let (text, number, kwargs): (&'static Json, &'static Json, &'static _) =
        (Box::leak(Box::new(text)), Box::leak(Box::new(number)), Box::leak(Box::new(kwargs)));
    assert_eq!(with(&|input| input.tools = Some(text)), Status::InvalidRequest);
    assert_eq!(with(&|input| input.tools = Some(number)), Status::InvalidRequest);
    assert_eq!(with(&|input| input.kwargs = Some(kwargs)), Status::InvalidRequest);
    assert_eq!(with(&|input| input.template = Some("other")), Status::InvalidRequest);
}

#[test]
fn errors_say_which_template_and_line() {
    let error = render("a\nb\n{{ messages[0].nothing.at_all }}", hello()).unwrap_err();
    assert_eq!(error.status(), Status::Template);
    assert!(error.message().starts_with("chat template \"default\", line 3: "), "{}", error.message());
    let error = render("{{ raise_exception('no system role') }}", hello()).unwrap_err();
    assert_eq!(error.message(), "the chat template refuses the messages: no system role");
    // A template that does not compile is no obstacle to loading the model.
    let error = render("{% if %}", hello()).unwrap_err();
    assert_eq!(error.status(), Status::Template);
    assert!(error.message().contains("syntax error"), "{}", error.message());
}

#[test]
fn text_parts_are_joined_and_others_kept() {
    let text = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(render("{{ messages[0].content }}", text).unwrap(), "ab");
    let mixed = json!([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}]);
    assert_eq!(render("{{ messages[0].content | length }}", mixed).unwrap(), "2");
    let empty = json!([{"role": "user", "content": []}]);
    assert_eq!(render("[{{ messages[0].content }}]", empty).unwrap(), "[]");
}

#[test]
fn variables_win_over_special_tokens() {
    let special = [("eos_token", "</s>"), ("pad_token", "<p>")].into_iter().collect();
    let source = "{{ eos_token }}{{ pad_token }}{{ bos_token }}{{ documents }}".to_owned();
    let templates = ChatTemplates::new([("default".to_owned(), source)].into(), special, LocalTime::now).unwrap();
    let (messages, kwargs) = (hello(), json!({"eos_token": "X", "documents": [1]}));
    let input = ChatInput { kwargs: kwargs.as_object(), ..ChatInput::new(&messages) };
    assert_eq!(templates.render(&input).unwrap(), "X<p>[1]");
    assert_eq!(templates.render(&ChatInput::new(&messages)).unwrap(), "</s><p>None");
}

#[test]
fn a_template_without_default_must_be_named() {
    let sources = [("a".to_owned(), "A".to_owned()), ("b".to_owned(), "B".to_owned())].into();
    let templates = ChatTemplates::new(sources, SpecialTokens::default(), LocalTime::now).unwrap();
    let messages = hello();
    let error = templates.render(&ChatInput::new(&messages)).unwrap_err();
    assert_eq!((error.status(), error.message().contains("a, b")), (Status::Template, true));
    let input = ChatInput { template: Some("b"), ..ChatInput::new(&messages) };
    assert_eq!(templates.render(&input).unwrap(), "B");
}

#[test]
fn the_system_clock_is_used() {
    let folder = crate::text::tests::TempFolder::new(&[("chat_template.jinja", "{{ strftime_now('%Y') }}")]);
    let model = folder.load().unwrap();
    let messages = hello();
    let year: i32 = model.templates().render(&ChatInput::new(&messages)).unwrap().parse().unwrap();
    assert!(year >= 2024);
}

#[test]
fn a_large_chat_renders_within_the_limits() {
    let source = std::fs::read_to_string(crate::text::tests::tiny_chat().join("chat_template.jinja")).unwrap();
    let message = json!({"role": "user", "content": "word ".repeat(200)});
    let messages = Json::Array(vec![message; 4000]);
    let text = render(&source, messages).unwrap();
    assert!(text.len() > 4_000_000);
}

/// Each would hang, exhaust the memory or overflow the stack without a limit, and must end as an error.
#[test]
fn hostile_templates_fail_in_bounded_time() {
    let nested = |step: &str, end: &str| {
        format!(
            "{{% set ns = namespace(a=[1]) %}}{{% for i in range(100000) %}}{{% set ns.a = {step} %}}{{% endfor %}}{end}"
        )
    };
    let chain = |unit: &str, count: usize| format!("{{{{ 1{} }}}}", unit.repeat(count));
    let hostile = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a %}{% endfor %}{% endfor %}".to_owned(),
        nested("[ns.a]", ""),
        nested("[ns.a]", "{{ ns.a }}"),
        nested("{'x': ns.a}", "{{ ns.a | tojson }}"),
        nested("(ns.a, 1)", "{{ ns.a == ns.a }}"),
        nested("{'x': ns.a}.items()", "{{ ns.a | string }}"),
        nested("ns.a | batch(1)", ""),
        nested("ns", "{{ ns }}"),
        nested("[ns]", "{{ ns.a }}"),
        nested("ns.a ~ ns.a", ""),
        nested("ns.a + ns.a", ""),
        "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}".to_owned(),
        "{% for a in [1] recursive %}{{ loop([[[[a]]]]) }}{% endfor %}".to_owned(),
        "{{ 'a' * 100000000000 }}".to_owned(),
        "{{ [1] * 100000000000 }}".to_owned(),
        "{{ '%1000000000d' | format(1) }}".to_owned(),
        "{{ '{:>1000000000}'.format(1) }}".to_owned(),
        "{{ 'a' | center(1000000000) }}{{ 'a'.ljust(1000000000) }}".to_owned(),
        "{{ [1] | tojson(indent=1000000000) }}".to_owned(),
        "{{ 'a\n' | indent(1000000000) }}".to_owned(),
        chain("+1", 100_000),
        chain("|string", 100_000),
        chain(".a", 100_000),
        chain(" if 1 else 2", 100_000),
        format!("{{{{ {}1{} }}}}", "(".repeat(4000), ")".repeat(4000)),
        format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(10_000)),
        format!("{}{}", "{% if 1 %}".repeat(10_000), "{% endif %}".repeat(10_000)),
    ];
    for source in hostile {
        let start = std::time::Instant::now();
        let shown: String = source.chars().take(90).collect();
        let outcome = render(&source, hello()).map(|text| text.len());
        let error = outcome.expect_err(&shown);
        assert_eq!(error.status(), Status::Template, "{shown}");
        assert!(start.elapsed() < TIME_LIMIT + Duration::from_secs(10), "{shown} took {:?}", start.elapsed());
    }
}

/// Recursion nests values without an assignment: the deepest that the limits allow must fit the stack when it is printed,
/// compared and dropped. What comes out, text or an error, does not matter; the process must live.
#[test]
fn the_deepest_values_fit_the_stack() {
    let brackets = format!("{}x{}", "[".repeat(40), "]".repeat(40));
    let batches = format!("x{}", "|batch(1)".repeat(250));
    let slices = format!("x{}", "[0:]".repeat(5));
    for deeper in [&brackets, &batches, &slices, "{'a': x}.items()|list"] {
        for end in ["{{ x }}", "{{ x | tojson }}", "{{ x == [x] }}", "{{ x ~ x }}", "{{ x | string | length }}"] {
            let last = format!("{{% if d > 190 %}}{end}{{% endif %}}");
            let loops = format!(
                "{{% for x in [[1]] recursive %}}{{% with d = loop.depth %}}{last}{{% endwith %}}{{{{ loop([{deeper}]) if loop.depth < 195 }}}}{{% endfor %}}"
            );
            let macros = format!(
                "{{% macro m(x, d) %}}{{{{ m({deeper}, d + 8) if d < 186 }}}}{last}{{% endmacro %}}{{{{ m([1], 0) }}}}"
            );
            for source in [loops, macros] {
                let outcome = render(&source, hello());
                assert!(outcome.is_ok() || outcome.is_err_and(|e| e.status() == Status::Template));
            }
        }
    }
}

/// The compiler recurses over chains; the longest that the limits allow must fit its stack.
#[test]
fn the_longest_permitted_chains_compile() {
    for (source, expected) in [
        (format!("{{{{ {}1 }}}}", "not ".repeat(4000)), "True"),
        (format!("{{{{ 0{} }}}}", "+1".repeat(2000)), "2000"),
        (format!("{{{{ 1{} }}}}", "|string".repeat(250)), "1"),
        (format!("{{{{ 1{} }}}}", " if 1 else 2".repeat(800)), "1"),
        (format!("{{% if 0 %}}{}{{% else %}}x{{% endif %}}", "{% elif 0 %}".repeat(1000)), "x"),
    ] {
        assert_eq!(render(&source, hello()).unwrap(), expected);
    }
}

/// What the limits must leave alone.
#[test]
fn ordinary_accumulation_passes_the_limits() {
    let source = "{% set ns = namespace(list=[], map={}) %}{% for i in range(500) %}{% set ns.list = ns.list + [[i]] %}\
                  {% set ns.last = ns.list[-2:] %}{% endfor %}{{ ns.list | length }}{{ ns.last }}";
    assert_eq!(render(source, hello()).unwrap(), "500[[498], [499]]");
    let nested = (0..100).fold(json!(1), |inner, _| json!({"a": inner}));
    let source = "{% set ns = namespace() %}{% set ns.x = messages[0].content %}{{ ns.x | tojson | length }}";
    assert_eq!(render(source, json!([{"role": "user", "content": nested}])).unwrap(), (100 * 7 + 1).to_string());
}

#[test]
fn a_rendering_that_runs_out_of_time_blocks_only_its_own_template() {
    // Comparing long equal strings costs one step each time, however long they are.
    let source = "{% if messages[0].content == 'slow' %}{% set a = 'x' * 30000000 %}{% set b = 'x' * 30000000 %}\
                  {% for i in range(1000) %}{% if a != b %}different{% endif %}{% endfor %}{% endif %}done";
    let mut slow = templates(source);
    slow.time_limit = Duration::from_millis(200);
    let (messages, quick) = (json!([{"role": "user", "content": "slow"}]), hello());
    assert_eq!(slow.render(&ChatInput::new(&quick)).unwrap(), "done");
    let error = slow.render(&ChatInput::new(&messages)).unwrap_err();
    assert!(error.message().contains("took longer"), "{}", error.message());
    let error = slow.render(&ChatInput::new(&quick)).unwrap_err();
    assert!(error.message().contains("still busy"), "{}", error.message());
    assert_eq!(render("fine", hello()).unwrap(), "fine");
    // Once the abandoned rendering ends the template is usable again.
    let start = std::time::Instant::now();
    while slow.render(&ChatInput::new(&quick)).is_err() {
        assert!(start.elapsed().as_secs() < 120);
        std::thread::sleep(Duration::from_millis(50));
    }
}
