//! Where each bound lies, and what does not count towards it.

use std::path::Path;

use proptest::prelude::*;

use super::*;

const ALL: [DecodingConstraint; 4] = [
    DecodingConstraint::Grammar,
    DecodingConstraint::JsonSchema,
    DecodingConstraint::Regex,
    DecodingConstraint::StopList,
];

fn measured(kind: DecodingConstraint, text: &str) -> Result<(), ConstraintTooLarge> {
    check(kind, text.as_bytes())
}

fn nested(levels: usize) -> Result<(), ConstraintTooLarge> {
    Err(ConstraintTooLarge::Nested { levels })
}

/// `inner` within so many brackets.
fn within(levels: usize, open: &str, inner: &str, close: &str) -> String {
    open.repeat(levels) + inner + &close.repeat(levels)
}

// CLOUD-1210
#[test]
fn an_open_bracket_50000_times_is_refused_by_its_depth() {
    let attack = "root ::= ".to_owned() + &"(".repeat(50_000);
    let error = measured(DecodingConstraint::Grammar, &attack).unwrap_err();
    assert_eq!(error.to_string(), "nested 50000 deep, at most 64");
}

// CLOUD-1210
#[test]
fn every_kind_may_be_64_deep_and_no_deeper() {
    let texts = [
        (DecodingConstraint::Grammar, "(", "\"a\"", ")"),
        (DecodingConstraint::Grammar, "(", "\"a\"", ")*"),
        (DecodingConstraint::Regex, "(", "a", ")"),
        (DecodingConstraint::Regex, "(?:", "a", ")+"),
        (DecodingConstraint::Regex, "[", "a", "]"),
        (DecodingConstraint::JsonSchema, "[", "1", "]"),
        (DecodingConstraint::JsonSchema, "{\"a\":", "{}", "}"),
    ];
    for (kind, open, inner, close) in texts {
        let more = usize::from(inner == "{}");
        let text = |levels: usize| within(levels - more, open, inner, close);
        assert_eq!(measured(kind, &text(64)), Ok(()), "{kind:?} {open}");
        assert_eq!(measured(kind, &text(65)), nested(65), "{kind:?} {open}");
    }
}

// CLOUD-1210
#[test]
fn every_kind_may_be_64_kib_long_and_no_longer() {
    for kind in ALL {
        assert_eq!(measured(kind, &" ".repeat(MAX_BYTES)), Ok(()), "{kind:?}");
        let long = Err(ConstraintTooLarge::Long { bytes: MAX_BYTES + 1 });
        assert_eq!(measured(kind, &" ".repeat(MAX_BYTES + 1)), long, "{kind:?}");
    }
}

// CLOUD-1210
#[test]
fn brackets_in_literals_classes_and_comments_of_a_grammar_are_no_nesting() {
    let many = "(".repeat(1_000);
    let texts = [
        format!("root ::= \"{many}\""),
        format!("root ::= \"a\\\"{many}\""),
        format!("root ::= \"a\\\\\" [{many}]"),
        format!("root ::= [^\"\\\\\\]{many}]"),
        format!("root ::= [{}]", "[".repeat(1_000)),
        format!("root ::= \"a\" # {many} \"\n"),
        format!("# {many}\rroot ::= <{many}>"),
        format!("root ::= a{{1,# {many}\n2}}"),
        format!("root: /{many}/ // \" {many}\n"),
    ];
    for text in texts {
        assert_eq!(measured(DecodingConstraint::Grammar, &text), Ok(()), "{}", &text[..24]);
    }
}

// CLOUD-1210
#[test]
fn what_follows_a_literal_a_class_or_a_comment_counts_again() {
    let many = "(".repeat(100);
    let before = [
        "\"\\\"\"",
        "\"\\\\\"",
        "\"[\"",
        "[\"]",
        "[^\"\\\\\\]]",
        "[]",
        "[a-]",
        "[#]",
        "# \"\n",
        "# [\r",
        "<[7]>",
        "<\\>",
        "/\"/",
        "// \"\n",
        "a{1,# }\n2}",
        "\"é\u{1f600}\"",
    ];
    for text in before {
        let text = format!("root ::= {text}{many}");
        assert_eq!(measured(DecodingConstraint::Grammar, &text), nested(100), "{text}");
    }
}

// CLOUD-1210
#[test]
fn operators_upon_operators_nest() {
    let grammar = |operators: usize| format!("root ::= \"a\"{}", "? ".repeat(operators));
    assert_eq!(
        measured(DecodingConstraint::Grammar, &grammar(65)),
        Ok(()),
        "the first is on the literal itself"
    );
    assert_eq!(measured(DecodingConstraint::Grammar, &grammar(66)), nested(65));
    // Neither the brackets nor the operators of one group are many.
    let mixed = within(8, "(", "\"a\"", ")*+?*+?*+?*");
    assert_eq!(measured(DecodingConstraint::Grammar, &mixed), nested(80));
    assert_eq!(measured(DecodingConstraint::Regex, &mixed.replace("\"a\"", "a")), nested(80));
    let side_by_side = "(\"a\")* ".repeat(1_000);
    assert_eq!(measured(DecodingConstraint::Grammar, &side_by_side), Ok(()));
}

// CLOUD-1210
#[test]
fn escapes_and_classes_of_a_regular_expression_are_no_nesting() {
    let escaped = "\\(".repeat(1_000);
    let class = format!("[{}]", "(".repeat(1_000));
    for text in [escaped, class, "[\\]((((".repeat(20), "\\[".repeat(500), "()".repeat(5_000)] {
        assert_eq!(measured(DecodingConstraint::Regex, &text), Ok(()), "{}", &text[..8]);
    }
    for before in ["\\\\", "[\\]]", "[]", "a{2}", "a{2,x", "\\[", "[^]"] {
        let text = before.to_owned() + &"(".repeat(100);
        assert_eq!(measured(DecodingConstraint::Regex, &text), nested(100), "{text}");
    }
}

// CLOUD-1210
#[test]
fn brackets_in_strings_of_a_schema_are_no_nesting_unless_it_is_a_pattern() {
    let many = "([{".repeat(1_000);
    let schema = |name: &str, text: &str| format!(r#"{{"type":"string","{name}":"{text}"}}"#);
    assert_eq!(measured(DecodingConstraint::JsonSchema, &schema("description", &many)), Ok(()));
    assert_eq!(measured(DecodingConstraint::JsonSchema, &schema("description", "\\\" {{")), Ok(()));
    let deep = "(".repeat(100);
    let hidden = "\\u0028".repeat(100);
    for (name, text) in [("pattern", &deep), ("pattern", &hidden), ("p\\u0061ttern", &deep)] {
        assert_eq!(
            measured(DecodingConstraint::JsonSchema, &schema(name, text)),
            nested(100),
            "{name} {text}"
        );
    }
    let names = format!(r#"{{"patternProperties":{{"{deep}":{{}}}}}}"#);
    assert_eq!(measured(DecodingConstraint::JsonSchema, &names), nested(100));
    let escaped = schema("pattern", &"\\\\(".repeat(100));
    assert_eq!(measured(DecodingConstraint::JsonSchema, &escaped), Ok(()), "a bracket that is escaped twice");
    let after = schema("description", "\\\\") + &"[".repeat(100);
    assert_eq!(measured(DecodingConstraint::JsonSchema, &after), nested(100));
}

// CLOUD-1216
#[test]
fn a_repetition_is_bounded_alone_within_others_and_beside_others() {
    let repeated = |times| Err(ConstraintTooLarge::Repeated { times });
    assert_eq!(measured(DecodingConstraint::Grammar, "root ::= a{10000}"), Ok(()));
    assert_eq!(measured(DecodingConstraint::Grammar, "root ::= a{1000000}"), repeated(1_000_000));
    assert_eq!(measured(DecodingConstraint::Grammar, "root ::= a{0, 10001}"), repeated(10_001));
    assert_eq!(measured(DecodingConstraint::Grammar, "root ::= a{10001,}"), repeated(10_001));
    assert_eq!(
        measured(DecodingConstraint::Grammar, &format!("a{{{}}}", "9".repeat(50))),
        repeated(u64::MAX)
    );
    assert_eq!(measured(DecodingConstraint::Regex, "a{1000000}"), repeated(1_000_000));
    let both: &[DecodingConstraint] = &[DecodingConstraint::Grammar, DecodingConstraint::Regex];
    let texts = [
        ("((a{1000}){1000}){1000}".to_owned(), both),
        ("a{1000}{1000}{1000}".to_owned(), both),
        ("a {1000} {1000}".to_owned(), &both[..1]),
        ("a{0,2000} ".repeat(1_000), both),
        // Open to the end.
        ("(".repeat(30) + &"a{2000}".repeat(1_000), both),
        (format!("\"{}\"{{2000}}", "long".repeat(1_000)), &both[..1]),
        (format!("[{}]{{2000}}", "long".repeat(1_000)), both),
    ];
    for (text, kinds) in texts {
        for kind in kinds {
            let error = measured(*kind, &text).unwrap_err();
            assert!(matches!(error, ConstraintTooLarge::Expanded { .. }), "{kind:?} {error}");
        }
    }
    let lines = "root ::= ([a-z]{1,100} \"\\n\"){1,50}";
    assert_eq!(measured(DecodingConstraint::Grammar, lines), Ok(()));
    assert_eq!(measured(DecodingConstraint::Regex, "^[^{}]{2,40}{{x}}{$"), Ok(()));
}

// CLOUD-1216
#[test]
fn the_lengths_that_a_schema_allows_add_up() {
    let expanded = |parts| Err(ConstraintTooLarge::Expanded { parts });
    let schema = |text: &str| measured(DecodingConstraint::JsonSchema, text);
    assert_eq!(schema(r#"{"maxLength": 262144}"#), Ok(()));
    assert_eq!(schema(r#"{"maxLength": 262145}"#), expanded(262_145));
    assert_eq!(schema(r#"[{"maxItems":200000},{"minLength":100000}]"#), expanded(300_000));
    assert_eq!(schema(r#"{"maxLength":1e9}"#), expanded(1_000_000_000));
    assert_eq!(schema(r#"{"maxLength":0.000001e+15}"#), expanded(1_000_000_000_000_000));
    assert_eq!(schema(r#"{"maxLength":5e-1,"maxItems":1.5}"#), Ok(()));
    assert_eq!(schema(r#"{"maximum":9007199254740991,"default":[1e300]}"#), Ok(()));
    assert_eq!(schema(r#"{"maxLength":{"maximum":9007199254740991}}"#), Ok(()), "the name of a property");
    let times = ConstraintTooLarge::Repeated { times: 1_000_000 };
    assert_eq!(schema(r#"{"pattern":"^a{1000000}$"}"#), Err(times));
    let patterns = format!("[{}]", [r#"{"pattern":"a{10000}"}"#; 30].join(","));
    assert!(matches!(schema(&patterns), Err(ConstraintTooLarge::Expanded { .. })));
}

/// Rules of which each names the next one twice.
fn doubled(rules: usize) -> String {
    let names = (0..rules).map(|rule| format!("a{rule} ::= a{0} \"x\" | a{0} \"y\"\n", rule + 1));
    format!("root ::= a0\n{}a{rules} ::= \"z\"\n", names.collect::<String>())
}

fn ways(ways: u64) -> Result<(), ConstraintTooLarge> {
    Err(ConstraintTooLarge::Ways { ways })
}

// CLOUD-1216
#[test]
fn forty_rules_that_each_name_the_next_twice_are_refused_by_their_ways() {
    let attack = doubled(40);
    assert!(attack.len() < 1_100);
    let error = measured(DecodingConstraint::Grammar, &attack).unwrap_err();
    assert_eq!(error.to_string(), "a place that can begin in 1099511627776 ways, at most 4096");
    assert_eq!(measured(DecodingConstraint::Grammar, &doubled(1_000)), ways(u64::MAX));
}

// CLOUD-1216
#[test]
fn a_place_of_a_grammar_may_begin_in_4096_ways_and_in_no_more() {
    let grammar = |text: &str| measured(DecodingConstraint::Grammar, text);
    assert_eq!(grammar(&doubled(12)), Ok(()));
    assert_eq!(grammar(&doubled(13)), ways(8_192));
    let alternatives = |count| format!("root ::= {}", vec!["\"a\""; count].join(" | "));
    assert_eq!(grammar(&alternatives(4_096)), Ok(()));
    assert_eq!(grammar(&alternatives(4_097)), ways(4_097));
    let rules = doubled(13);
    let rules = rules.strip_prefix("root ::= a0\n").unwrap();
    // Wherever it stands and however it is written.
    for root in ["\"x\" a0", "(\"x\" (a0))", "\"x\"{2,3} a0", "\"\\\"\" a0", "[\"] a0", "\"x\" (# a\n a0*)"] {
        assert_eq!(grammar(&format!("root ::= {root}\n{rules}")), ways(8_192), "{root}");
    }
    // The last of several rules with one name counts, and none after a zero byte.
    assert_eq!(grammar(&format!("root ::= a0\n{rules}a13 ::= a14\na14 ::= \"z\"\n")), ways(8_192));
    assert_eq!(grammar(&format!("root ::= a0\n{rules}a1 ::= \"z\"\n")), Ok(()));
    assert_eq!(grammar(&format!("root ::= a0\n{rules}\0\na1 ::= \"z\"\n")), ways(8_192));
    // A rule within itself has all its ways.
    let within = format!("{} | \"x\" (root | root | root | root | root)", alternatives(1_000));
    assert_eq!(grammar(&within), ways(5_005));
    // Ways that a sequence does not begin in are none: a value holds values.
    let nested = "v ::= \"[\" v (\",\" v)* \"]\" | \"{\" v v v \"}\" | [a-z]+ v\n";
    assert_eq!(grammar(nested), Ok(()));
}

// CLOUD-1216
#[test]
fn what_may_be_empty_is_bounded_side_by_side_and_repeated() {
    let steps = |steps| Err(ConstraintTooLarge::Steps { steps });
    let grammar = |text: &str| measured(DecodingConstraint::Grammar, text);
    let row = |part: &str, count: usize| format!("root ::= \"x\" {}", vec![part; count].join(" "));
    for part in ["\"a\"?", "\"a\"*", "[a-z]{0,9}", "(\"a\" \"b\")?"] {
        assert_eq!(grammar(&row(part, 362)), Ok(()), "{part}");
        assert_eq!(grammar(&row(part, 363)), steps(65_703), "{part}");
    }
    assert_eq!(grammar(&row("\"a\"+", 2_000)), Ok(()), "none of them can be left out");
    let repeated = |times: u64| format!("root ::= r{{0,{times}}}\nr ::= \"a\"?\n");
    assert_eq!(grammar(&repeated(250)), Ok(()));
    assert_eq!(grammar(&repeated(1_999)), steps(1_999 * 2_000));
    let error = grammar(&repeated(1_999)).unwrap_err().to_string();
    assert_eq!(error, "a place where the next character takes 3998000 steps to find, at most 65536");
}

// CLOUD-1216
#[test]
fn a_chain_of_rules_may_be_long_but_not_on_many_ways() {
    let names = (0..2_800).map(|rule| format!("b{rule} ::= b{} \"x\"\n", rule + 1));
    let chain = format!("{}b2800 ::= \"z\"\n", names.collect::<String>());
    let on_ways = |doublings: usize| doubled(doublings).replace("::= \"z\"", "::= b0") + &chain;
    assert_eq!(measured(DecodingConstraint::Grammar, &on_ways(4)), Ok(()));
    let many = measured(DecodingConstraint::Grammar, &on_ways(5));
    assert!(matches!(many, Err(ConstraintTooLarge::Steps { .. })), "{many:?}");
}

// CLOUD-1216
#[test]
fn a_rule_that_begins_with_itself_after_what_may_be_empty_is_refused() {
    let grammar = |text: &str| measured(DecodingConstraint::Grammar, text);
    let attacks = [
        ("root ::= r root \"x\"\nr ::= \"b\"?\n", 0),
        ("root ::= (\"b\"?) root \"x\"\n", 0),
        ("root ::= [] root \"x\"\n", 0),
        ("root ::= \"y\" | (a \"y\" | \"b\"{0,2} (root) \"z\")\na ::= \"a\"", 0),
        ("root ::= a\na ::= b \"x\"\nb ::= e a | \"z\"\ne ::= \"\"", 11),
    ];
    for (attack, at) in attacks {
        assert_eq!(grammar(attack), Err(ConstraintTooLarge::LeftRecursive { at }), "{attack}");
    }
    let error = grammar(attacks[4].0).unwrap_err().to_string();
    assert_eq!(error, "the rule at byte 11 begins with itself after a part that may be empty");
    for text in
        ["root ::= root \"x\" | \"b\"", "root ::= (\"a\"?)*", "root ::= \"a\" ws root? ws\nws ::= [ ]*"]
    {
        assert_eq!(grammar(text), Ok(()), "{text}");
    }
}

// CLOUD-1210
#[test]
fn a_field_of_a_body_is_measured_by_what_its_string_stands_for() {
    let attack = "root ::= \"\\\"\" ".to_owned() + &"(".repeat(100);
    let json = |text: &str| serde_json::to_string(text).unwrap();
    for raw in [json(&attack), format!(" \n{}", json(&attack)), json(&attack).replace('(', "\\u0028")] {
        assert_eq!(check_json(DecodingConstraint::Grammar, raw.as_bytes()), nested(100), "{raw}");
    }
    assert_eq!(check_json(DecodingConstraint::Regex, json(&"\\(".repeat(100)).as_bytes()), Ok(()));
    assert_eq!(check_json(DecodingConstraint::Regex, json(&"(".repeat(100)).as_bytes()), nested(100));
    // Its own length counts, not that of its escapes.
    let lines = json(&"\n".repeat(MAX_BYTES));
    assert_eq!(check_json(DecodingConstraint::Grammar, lines.as_bytes()), Ok(()));
    let long = Err(ConstraintTooLarge::Long { bytes: MAX_BYTES + 2 });
    let letters = format!("\"{}\"", "\\u00e9".repeat(MAX_BYTES / 2 + 1));
    assert_eq!(check_json(DecodingConstraint::Grammar, letters.as_bytes()), long);
    let pairs = format!("\"{}\"", "\\ud83d\\ude00".repeat(MAX_BYTES / 4 + 1));
    let long = Err(ConstraintTooLarge::Long { bytes: MAX_BYTES + 4 });
    assert_eq!(check_json(DecodingConstraint::Grammar, pairs.as_bytes()), long);
    for kind in ALL {
        assert_eq!(check_json(kind, "[".repeat(100).as_bytes()), nested(100), "{kind:?}");
    }
    assert_eq!(check_json(DecodingConstraint::StopList, br#"["((((", "\n"]"#), Ok(()));
    let stops = format!("[\"{}\"]", "x".repeat(MAX_BYTES));
    assert!(check_json(DecodingConstraint::StopList, stops.as_bytes()).is_err());
}

// CLOUD-1210
// CLOUD-1216
#[test]
fn real_grammars_pass() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/grammars");
    let mut passed = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(measured(DecodingConstraint::Grammar, &text), Ok(()), "{}", path.display());
        let raw = serde_json::to_vec(&text).unwrap();
        assert_eq!(check_json(DecodingConstraint::Grammar, &raw), Ok(()), "{}", path.display());
        passed += 1;
    }
    assert_eq!(passed, 50);
}

#[test]
fn every_byte_may_stand_anywhere() {
    for byte in 0..=u8::MAX {
        for start in
            ["", "root ::= ", "\"", "\"\\", "[", "[^\\", "(", "a{", "a{1,", "\"\\u", "{\"pattern\":\""]
        {
            let text = [start.as_bytes(), &[byte], &[byte]].concat();
            for kind in ALL {
                assert_eq!(check(kind, &text), Ok(()), "{kind:?} {text:?}");
                // Whether a string ends or not is no bound.
                assert_eq!(check_json(kind, &text), Ok(()), "{kind:?} {text:?}");
            }
        }
    }
}

proptest! {
    // CLOUD-1210
    #[test]
    fn a_grammar_in_a_body_is_measured_as_the_grammar_itself(text in "[\"\\\\\\[\\]()#{}0-9,*+?a-c\n/<> é]{0,200}") {
        let raw = serde_json::to_vec(&text).unwrap();
        for kind in [DecodingConstraint::Grammar, DecodingConstraint::Regex] {
            prop_assert_eq!(check_json(kind, &raw), check(kind, text.as_bytes()));
        }
    }

    // CLOUD-1210
    #[test]
    fn brackets_alone_nest_as_they_are_counted(opens in proptest::collection::vec(any::<bool>(), 0..400)) {
        let text: String = opens.iter().map(|open| if *open { '(' } else { ')' }).collect();
        let (mut depth, mut deepest) = (0_usize, 0);
        for open in opens {
            depth = if open { depth + 1 } else { depth.saturating_sub(1) };
            deepest = depth.max(deepest);
        }
        let expected = if deepest > MAX_NESTING { nested(deepest) } else { Ok(()) };
        prop_assert_eq!(measured(DecodingConstraint::Regex, &text), expected);
        prop_assert_eq!(measured(DecodingConstraint::Grammar, &text), expected);
    }
}
