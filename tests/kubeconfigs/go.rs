//! PEM and proxy variables, compared with Go.

use std::process::{Command, Stdio};
use std::sync::LazyLock;

use pintle::kubernetes::Proxy;
use pintle_agent_core::pem_block::PemBlocks;
use pintle_test_support::ScratchDirectory;

/// The program oracle.go, which runs Go's standard library.
static ORACLE: LazyLock<(ScratchDirectory, std::path::PathBuf)> = LazyLock::new(|| {
    let scratch = ScratchDirectory::new();
    let (program, source) =
        (scratch.join("oracle"), concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kubeconfigs/oracle.go"));
    let built = Command::new("go").args(["build", "-o"]).arg(&program).arg(source).env("CGO_ENABLED", "0").output();
    let built = built.expect("go starts");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    (scratch, program)
});

/// Go's answers, one line per question.
fn oracle(question: &str, environment: &[(&str, &str)], lines: &[String]) -> Vec<String> {
    use std::io::Write as _;
    let mut command = Command::new(&ORACLE.1);
    command.arg(question).env_clear().envs(environment.iter().copied());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
    let input = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
    let mut stdin = child.stdin.take().expect("a pipe");
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).expect("written"));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("written");
    assert!(output.status.success());
    let answers: Vec<_> = String::from_utf8(output.stdout).expect("text").lines().map(str::to_owned).collect();
    assert_eq!(answers.len(), lines.len());
    answers
}

#[test]
fn c37_the_same_proxy_is_chosen_as_by_go() {
    let servers = [
        "https://api.example:6443",
        "https://api.example",
        "https://API.Example:6443",
        "https://sub.api.example:6443",
        "https://xapi.example:6443",
        "https://example:6443",
        "https://10.0.0.1:6443",
        "https://10.1.2.3",
        "https://192.0.2.7:8443",
        "https://[2001:db8::1]:6443",
        "https://[2001:db8:1::1]",
        "https://[::1]:6443",
        "https://[::ffff:10.0.0.1]:6443",
        "https://[::ffff:127.0.0.1]",
        "https://127.0.0.1:6443",
        "https://127.8.8.8",
        "https://localhost:6443",
        "https://LOCALHOST:6443",
        "https://localhost.:6443",
        "https://sub.localhost",
        "http://api.example:8080",
        "http://10.0.0.1",
    ]
    .map(str::to_owned);
    let proxies = [
        "http://proxy.example:3128",
        "http://proxy.example",
        "proxy.example:3128",
        "proxy.example",
        "10.9.9.9:3128",
        "http://proxy.example:3128/",
        "https://proxy.example",
        "socks5://proxy.example",
        "socks5h://proxy.example:1",
        "http://user:word@proxy.example:3128",
        "user:word@proxy.example:3128",
        "http://[2001:db8::9]:3128",
        "none",
        "DIRECT",
        " http://proxy.example:3128",
        "http://",
        "://",
        "",
    ];
    // Except a trailing space, for which Go chooses the proxy http://http:80.
    let exceptions = [
        "",
        ",",
        " , ,",
        "*",
        "a,*",
        "api.example",
        ".api.example",
        "*.api.example",
        "API.example",
        " api.example , x",
        "api.example:6443",
        "api.example:443",
        "api.example:",
        ":6443",
        ".example:6443",
        "*.example",
        "example",
        "*example",
        "10.0.0.0/8",
        "10.0.0.1",
        "10.0.0.1:6443",
        "10.0.0.1:80",
        "10.0.0.0/33",
        "010.0.0.0/8",
        "10.0.0.1/32",
        "0.0.0.0/0",
        "2001:db8::/32",
        "2001:db8::1",
        "[2001:db8::1]",
        "[2001:db8::1]:6443",
        "[2001:db8::1]:1",
        "2001:db8:1::/48",
        "::/0",
        "::ffff:10.0.0.0/104",
        "::ffff:10.0.0.1",
        "192.0.2.7:8443",
        "localhost",
        "10.",
        "a b",
        "http://api.example",
        "[",
        "]:1",
        "10.0.0.0/8,.svc,.cluster.local,api.example",
        "fe80::1%eth0",
    ];
    let mut environments: Vec<Vec<(&str, &str)>> = Vec::new();
    for proxy in proxies {
        for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"] {
            environments.push(vec![(name, proxy)]);
        }
        environments.push(vec![("HTTPS_PROXY", proxy), ("https_proxy", "other.example:1")]);
    }
    for exception in exceptions {
        for name in ["NO_PROXY", "no_proxy"] {
            let both = ["HTTPS_PROXY", "HTTP_PROXY"].map(|proxy| (proxy, "http://proxy.example:3128"));
            environments.push(both.into_iter().chain([(name, exception)]).collect());
        }
    }
    environments.push(vec![("HTTPS_PROXY", "p:1"), ("NO_PROXY", "10.0.0.1"), ("no_proxy", "api.example")]);
    environments.push(vec![("HTTPS_PROXY", "p:1"), ("NO_PROXY", ""), ("no_proxy", "api.example")]);
    let mut proxied = 0;
    for environment in environments {
        let answers = oracle("proxy", &environment, &servers);
        for (server, answer) in servers.iter().zip(answers) {
            let value = |name: &str| environment.iter().find(|(known, _)| *known == name).map(|it| it.1.to_owned());
            let chosen = Proxy::of_variables(value, &server.parse().expect("a URL"));
            let chosen = chosen.map_or("-".to_owned(), |proxy| {
                let port = proxy.url.port_u16().expect("it always has one");
                let user = proxy.user_info().map(|bytes| String::from_utf8(bytes).expect("text")).unwrap_or_default();
                format!(
                    "{} {} {port} {user}",
                    proxy.url.scheme_str().expect("a scheme"),
                    proxy.url.host().expect("a host")
                )
            });
            proxied += usize::from(chosen != "-");
            assert_eq!(chosen.trim_end(), answer.trim_end(), "{environment:?} {server}");
        }
    }
    assert!(proxied > 100);
}

#[test]
fn the_same_pem_blocks_are_decoded_as_by_go() {
    let key = rcgen::KeyPair::generate().expect("a key").serialize_pem();
    let certificate = rcgen::generate_simple_self_signed(vec!["a".to_owned()]).expect("a certificate").cert.pem();
    let (key, certificate) = (key.replace("\r\n", "\n"), certificate.replace("\r\n", "\n"));
    let whole = format!("note\n{key}{certificate}{key}");
    let mut texts = vec![String::new(), whole.clone(), whole.replace('\n', "\r\n"), whole.replace('\n', "\n\n")];
    // At every position of a short text: one character removed, one added, and truncated there.
    let short =
        "a\n-----BEGIN X-----\nk: v\n\nAAEC\nAwQF\n-----END X-----\nb\n-----BEGIN Y-----\nAAA=\n-----END Y-----\n";
    for place in 0..short.len() {
        let (before, after) = short.split_at(place);
        texts.push(format!("{before}{}", &after[1..]));
        texts.push(before.to_owned());
        for more in
            ["\n", "\r\n", " ", "\t", "-", ":", "A", "=", "*", "\0", "\r", "-----BEGIN Z-----\n", "\n-----END X-----\n"]
        {
            texts.push(format!("{before}{more}{after}"));
        }
    }
    for place in (0..whole.len()).step_by(7) {
        let (before, after) = whole.split_at(place);
        texts.extend([format!("{before}{}", &after[1..]), before.to_owned(), format!("{before}\n{after}")]);
    }
    let hexadecimal = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let questions: Vec<_> = texts.iter().map(|text| hexadecimal(text.as_bytes())).collect();
    let answers = oracle("pem", &[], &questions);
    let mut decoded = 0;
    for (text, answer) in texts.iter().zip(answers) {
        let blocks = PemBlocks::of(text).blocks;
        decoded += blocks.len();
        let words: Vec<_> = blocks
            .iter()
            .map(|block| format!("{}={}", hexadecimal(block.label.as_bytes()), hexadecimal(&block.content)))
            .collect();
        assert_eq!(words.join(" "), answer, "{text:?}");
    }
    assert!(decoded > 1000);
}
