//! The other proxies, each configured for this job as well as its manual allows.
//!
//! All of them verify the server's chain and name, present the node's certificate, and do not resume sessions with
//! the server. Those that accept TLS require the local client's certificate, as pintle does. None logs connections.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustls::ClientConfig;

use crate::load::ProxyAddress;
use crate::process::Process;

/// A running proxy.
pub(crate) struct Proxy {
    pub(crate) name: &'static str,
    pub(crate) process: Process,
    pub(crate) tls: Option<ProxyAddress>,
    pub(crate) unix: ProxyAddress,
}

/// The files of a proxy's job.
pub(crate) struct Job {
    /// A directory for the proxy's files.
    pub(crate) directory: PathBuf,
    pub(crate) server: SocketAddr,
    pub(crate) authority: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    /// Certificate and key of the local side in one file, and the CA of the local client.
    pub(crate) local_pair: PathBuf,
    pub(crate) local_authority: PathBuf,
    /// The local client's TLS configuration.
    pub(crate) client: Arc<ClientConfig>,
}

impl Job {
    fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.sock"))
    }

    fn write(&self, name: &str, configuration: &str) -> PathBuf {
        let path = self.directory.join(name);
        std::fs::write(&path, configuration).expect("a configuration");
        path
    }

    fn start(&self, name: &'static str, command: &mut Command, address: Option<SocketAddr>) -> Proxy {
        let socket = self.socket(name);
        // A stale socket file would look like a started proxy, and some proxies fail if it exists.
        let _ = std::fs::remove_file(&socket);
        let mut process = Process::start(command, &self.directory.join(format!("{name}.log")));
        process.wait_until(name, |_| {
            UnixStream::connect(&socket).is_ok()
                && address.is_none_or(|address| std::net::TcpStream::connect(address).is_ok())
        });
        let tls = address.map(|address| ProxyAddress::Tls(address, Arc::clone(&self.client)));
        Proxy { name, process, tls, unix: ProxyAddress::Unix(socket) }
    }
}

/// A port that is not in use.
pub(crate) fn free_address() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address")
}

/// nginx with its stream module, and one worker per CPU.
pub(crate) fn nginx(job: &Job) -> Option<Proxy> {
    let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
    if !module.exists() || !Path::new("/usr/sbin/nginx").exists() {
        return None;
    }
    let (address, socket) = (free_address(), job.socket("nginx"));
    let configuration = format!(
        "load_module {module};
daemon off;
worker_processes auto;
pid {directory}/nginx.pid;
error_log {directory}/nginx.errors warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 8192; }}
stream {{
  proxy_ssl on;
  proxy_ssl_protocols TLSv1.3;
  proxy_ssl_certificate {certificate};
  proxy_ssl_certificate_key {key};
  proxy_ssl_trusted_certificate {authority};
  proxy_ssl_verify on;
  proxy_ssl_name localhost;
  proxy_ssl_session_reuse off;
  proxy_timeout 1h;
  tcp_nodelay on;
  server {{
    proxy_pass {server};
    listen {address} ssl backlog=4096;
    ssl_protocols TLSv1.3;
    ssl_certificate {local};
    ssl_certificate_key {local};
    ssl_client_certificate {local_authority};
    ssl_verify_client on;
  }}
  server {{
    proxy_pass {server};
    listen unix:{socket} backlog=4096;
  }}
}}
",
        module = module.display(),
        directory = job.directory.display(),
        server = job.server,
        certificate = job.certificate.display(),
        key = job.key.display(),
        authority = job.authority.display(),
        local = job.local_pair.display(),
        local_authority = job.local_authority.display(),
        socket = socket.display(),
    );
    let file = job.write("nginx.conf", &configuration);
    let mut command = Command::new("/usr/sbin/nginx");
    Some(job.start("nginx", command.arg("-p").arg(&job.directory).arg("-c").arg(file), Some(address)))
}

/// haproxy in TCP mode, with one thread per CPU.
pub(crate) fn haproxy(job: &Job) -> Option<Proxy> {
    if !Path::new("/usr/sbin/haproxy").exists() {
        return None;
    }
    let (address, socket) = (free_address(), job.socket("haproxy"));
    // haproxy expects certificate and key in one file.
    let pair = [&job.certificate, &job.key].map(|path| std::fs::read_to_string(path).expect("a file")).concat();
    let pair = job.write("haproxy.pem", &pair);
    let configuration = format!(
        "global
  maxconn 8192
defaults
  mode tcp
  timeout connect 5s
  timeout client 1h
  timeout server 1h
frontend tls
  bind {address} backlog 4096 ssl crt {local} ca-file {local_authority} verify required ssl-min-ver TLSv1.3
  default_backend server
frontend plain
  bind unix@{socket} backlog 4096
  default_backend server
backend server
  server common {server} ssl crt {pair} ca-file {authority} verify required verifyhost localhost sni str(localhost) no-ssl-reuse ssl-min-ver TLSv1.3
",
        local = job.local_pair.display(),
        local_authority = job.local_authority.display(),
        socket = socket.display(),
        server = job.server,
        pair = pair.display(),
        authority = job.authority.display(),
    );
    let file = job.write("haproxy.cfg", &configuration);
    let mut command = Command::new("/usr/sbin/haproxy");
    Some(job.start("haproxy", command.arg("-db").arg("-f").arg(file), Some(address)))
}

/// stunnel is either a TLS server or a TLS client: here a client.
pub(crate) fn stunnel(job: &Job) -> Option<Proxy> {
    if !Path::new("/usr/bin/stunnel4").exists() {
        return None;
    }
    let mut configuration = String::new();
    let settings = [
        ("foreground", "yes".to_owned()),
        ("pid", String::new()),
        ("debug", "warning".to_owned()),
        ("socket", "l:TCP_NODELAY=1".to_owned()),
        ("socket", "r:TCP_NODELAY=1".to_owned()),
    ];
    for (name, value) in settings {
        let _ = writeln!(configuration, "{name} = {value}");
    }
    let _ = write!(
        configuration,
        "[server]\nclient = yes\naccept = {socket}\nconnect = {server}\ncert = {certificate}\nkey = {key}\n\
         CAfile = {authority}\nverifyChain = yes\ncheckHost = localhost\nsni = localhost\nsslVersionMin = TLSv1.3\n\
         sessionResume = no\nTIMEOUTidle = 3600\n",
        socket = job.socket("stunnel").display(),
        server = job.server,
        certificate = job.certificate.display(),
        key = job.key.display(),
        authority = job.authority.display(),
    );
    let file = job.write("stunnel.conf", &configuration);
    Some(job.start("stunnel", Command::new("/usr/bin/stunnel4").arg(file), None))
}

/// ghostunnel as a client. As with stunnel, only one of its sides has TLS.
pub(crate) fn ghostunnel(job: &Job, program: &Path) -> Option<Proxy> {
    if !program.exists() {
        return None;
    }
    let mut command = Command::new(program);
    command.args(["client", "--quiet=conns", "--quiet=conn-errs", "--quiet=handshake-errs"]);
    command.arg("--override-server-name=localhost");
    command.arg("--listen").arg(format!("unix:{}", job.socket("ghostunnel").display()));
    command.arg("--target").arg(job.server.to_string());
    for (flag, path) in [("--cert", &job.certificate), ("--key", &job.key), ("--cacert", &job.authority)] {
        command.arg(flag).arg(path);
    }
    Some(job.start("ghostunnel", &mut command, None))
}
