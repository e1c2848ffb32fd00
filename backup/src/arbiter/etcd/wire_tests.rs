use super::*;
use vmft_fuzzing::{Random, cases, damage, peak_of};

/// Cases of a quick run.
const CASES: u64 = 3_000;
const HEADER: &str =
    r#"{"cluster_id":"15118495548433857066","member_id":"7","revision":"2","raft_term":"2"}"#;

fn key(name: &str) -> String {
    format!("vmft/web/{name}")
}

fn win() -> Question {
    let (generation, pair) = (key("generation-0000000002"), key("pair"));
    Question::Transaction(Transaction {
        compare: vec![
            Compare::Is { key: pair.clone(), value: "p".into() },
            Compare::Absent { key: generation.clone() },
        ],
        success: vec![Operation::Put { key: generation.clone(), value: "w".into(), lease: None }],
        failure: vec![Operation::Get { key: pair }, Operation::Get { key: generation }],
    })
}

fn list() -> Question {
    let put = Operation::Put { key: key("candidate-2/a"), value: "7".into(), lease: None };
    let list = Operation::List { prefix: key("candidate-2/") };
    Question::Transaction(Transaction { success: vec![put, list], ..Transaction::default() })
}

fn range(pairs: &[(&str, &str)]) -> String {
    let pair = |(key, value): &(&str, &str)| json!({"key": text(key), "value": text(value), "version": "1", "mod_revision": "2"});
    let pairs: Vec<_> = pairs.iter().map(pair).collect();
    json!({"response_range": {"header": {"revision": "2"}, "kvs": pairs}}).to_string()
}

fn answer(succeeded: bool, parts: &[String]) -> Vec<u8> {
    let word = if succeeded { r#""succeeded":true,"# } else { "" };
    format!(r#"{{"header":{HEADER},{word}"responses":[{}]}}"#, parts.join(",")).into_bytes()
}

/// Questions with good answers to them, as an etcd of version 3.4 gives them.
fn good() -> Vec<(Question, u16, Vec<u8>)> {
    let put = r#"{"response_put":{"header":{"revision":"3"}}}"#.to_owned();
    let (pair, winner) = (key("pair"), key("generation-0000000002"));
    let (a, b) = (key("candidate-2/a"), key("candidate-2/b"));
    let lease = LeaseId(4_111_120_358_113_457_669);
    let lost = [range(&[(&pair, "p")]), range(&[(&winner, "{}")])];
    let granted = format!(r#"{{"header":{HEADER},"ID":"4111120358113457669","TTL":"20"}}"#);
    let kept = format!(r#"{{"result":{granted}}}"#);
    let gone = r#"{"error":"etcdserver: requested lease not found","message":"","code":5}"#;
    vec![
        (win(), 200, answer(true, std::slice::from_ref(&put))),
        (win(), 200, answer(false, &lost)),
        (list(), 200, answer(true, &[put, range(&[(&b, "9"), (&a, "7")])])),
        (Question::Grant(20), 200, granted.into_bytes()),
        (Question::KeepAlive(lease), 200, kept.into_bytes()),
        (Question::KeepAlive(lease), 404, gone.into()),
        (Question::Revoke(lease), 200, format!(r#"{{"header":{HEADER}}}"#).into_bytes()),
    ]
}

#[test]
fn questions_are_asked_as_etcd_takes_them() {
    let body = String::from_utf8(win().encode()).expect("JSON");
    let value: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(win().path(), "/v3/kv/txn");
    // `printf vmft/web/pair | base64`
    assert_eq!(value["compare"][0]["key"], "dm1mdC93ZWIvcGFpcg==");
    assert_eq!(value["compare"][0]["target"], "VALUE");
    assert_eq!(value["compare"][1]["create_revision"], "0");
    assert_eq!(value["success"][0]["request_put"]["value"], "dw==");
    assert!(value["failure"][1]["request_range"].get("range_end").is_none());
    assert!(!body.contains("serializable"), "a read that may be old decides nothing");
    let none = Compare::NoneUnder { prefix: "sides/".into() }.json();
    assert_eq!((&none["key"], &none["range_end"]), (&json!("c2lkZXMv"), &json!("c2lkZXMw")));
}

#[test]
fn good_answers_are_read() {
    let read: Vec<_> = good()
        .iter()
        .map(|(question, status, bytes)| question.read(*status, bytes).expect("good"))
        .collect();
    let history = History { cluster: 15_118_495_548_433_857_066, revision: 2 };
    let pair = |key: String, value: &str| vec![Pair { key, value: value.to_owned() }];
    let lost = vec![pair(key("pair"), "p"), pair(key("generation-0000000002"), "{}")];
    let others = [pair(key("candidate-2/b"), "9"), pair(key("candidate-2/a"), "7")].concat();
    let decided = |succeeded, read| Answer::Transaction { history, succeeded, read };
    assert_eq!(
        read,
        [
            decided(true, vec![vec![]]),
            decided(false, lost),
            decided(true, vec![vec![], others]),
            Answer::Granted(LeaseId(4_111_120_358_113_457_669)),
            Answer::Kept,
            Answer::LeaseGone,
            Answer::Revoked,
        ]
    );
}

#[test]
fn a_lease_that_has_run_out_is_kept_alive_in_vain() {
    let gone = format!(r#"{{"result":{{"header":{HEADER},"ID":"77"}}}}"#);
    let asked = |id| Question::KeepAlive(LeaseId(id)).read(200, gone.as_bytes());
    assert_eq!(asked(77).expect("good"), Answer::LeaseGone);
    assert!(matches!(asked(78), Err(WireError::Other)), "another's");
    // A generation hangs on no lease: nothing that etcd says of leases decides it.
    let not_found = br#"{"error":"etcdserver: requested lease not found","code":5}"#;
    assert!(matches!(win().read(404, not_found), Err(WireError::Refused { status: 404, .. })));
}

#[test]
fn what_answers_another_question_is_no_answer() {
    let (winner, other) = (key("generation-0000000002"), key("generation-0000000003"));
    let put = || r#"{"response_put":{}}"#.to_owned();
    let name = || range(&[(&key("pair"), "p")]);
    for (succeeded, parts) in [
        (true, vec![]),
        (true, vec![put(), put()]),
        (true, vec![name()]),
        (true, vec![r#"{"response_put":{},"response_range":{}}"#.to_owned()]),
        (true, vec!["{}".to_owned()]),
        (false, vec![put()]),
        (false, vec![name()]),
        (false, vec![name(), range(&[(&other, "{}")])]),
        (false, vec![name(), range(&[(&winner, "{}"), (&winner, "{}")])]),
        (false, vec![range(&[(&winner, "{}")]), name()]),
    ] {
        let bytes = answer(succeeded, &parts);
        let read = win().read(200, &bytes);
        assert!(matches!(read, Err(WireError::Other)), "{parts:?}: {read:?}");
    }
    let long = "x".repeat(MAX_VALUE + 3);
    let read = win().read(200, &answer(false, &[name(), range(&[(&winner, &long)])]));
    assert!(matches!(read, Err(WireError::TooLong)), "{read:?}");
    let no_base64 = answer(false, &[name(), range(&[])]);
    let no_base64 = String::from_utf8(no_base64).expect("text").replace("cA==", "c!==");
    assert!(win().read(200, no_base64.as_bytes()).is_err());
    // Deeper than any answer.
    let deep = [vec![b'['; 100_000], vec![b']'; 100_000]].concat();
    assert!(matches!(win().read(200, &deep), Err(WireError::Format(_))));
    let no_header = br#"{"succeeded":true,"responses":[{"response_put":{}}]}"#;
    assert!(matches!(win().read(200, no_header), Err(WireError::Format(_))));
}

#[test]
fn neighbours_that_are_no_text_hide_nobody_from_a_list() {
    let b = key("candidate-2/b");
    let foreign = [key("candidate-2/").as_bytes(), &[0xFF][..]].concat();
    let pairs = json!([
        {"key": STANDARD.encode(foreign), "value": text("1")}, {"key": text(&b), "value": text("9")}
    ]);
    let range = json!({"response_range": {"kvs": pairs}}).to_string();
    let read = list().read(200, &answer(true, &[r#"{"response_put":{}}"#.to_owned(), range]));
    let Ok(Answer::Transaction { read, .. }) = read else { panic!("{read:?}") };
    assert_eq!(read[1], [Pair { key: b, value: "9".into() }]);
}

/// What is damaged is refused, or is an answer within bounds to the question that was asked.
fn check(question: &Question, status: u16, bytes: &[u8]) {
    let (read, peak) = peak_of(|| question.read(status, bytes));
    assert!(peak < 64 * bytes.len() + (64 << 10), "{peak} bytes for {}", bytes.len());
    let Ok(answer) = read else { return };
    match (question, answer) {
        (Question::Transaction(asked), Answer::Transaction { succeeded, read, .. }) => {
            let done = if succeeded { &asked.success } else { &asked.failure };
            assert_eq!(done.len(), read.len());
            for (operation, read) in done.iter().zip(read) {
                assert!(read.len() <= LIST_LIMIT);
                let is_good =
                    |pair: &Pair| operation.asks_for(&pair.key) && pair.value.len() <= MAX_VALUE;
                assert!(read.iter().all(is_good), "{operation:?}: {read:?}");
            }
        }
        (Question::Grant(_), Answer::Granted(lease)) => assert_ne!(lease.0, 0),
        (Question::KeepAlive(_), Answer::Kept | Answer::LeaseGone)
        | (Question::Revoke(_), Answer::Revoked | Answer::LeaseGone) => {}
        (question, answer) => panic!("{answer:?} to {question:?}"),
    }
}

#[test]
fn whatever_etcd_answers_is_refused_or_an_answer_to_what_was_asked() {
    let good = good();
    let bodies: Vec<_> = good.iter().map(|(_, _, bytes)| bytes.clone()).collect();
    cases(CASES, |mut random: Random| {
        let (question, status, bytes) = random.pick(&good);
        let mut bytes = bytes.clone();
        if random.below(4) > 0 {
            damage(&mut random, &mut bytes, &bodies);
        }
        // Also as an answer to something else.
        let question = if random.below(4) > 0 { question } else { &random.pick(&good).0 };
        check(question, *status, &bytes);
    });
}
