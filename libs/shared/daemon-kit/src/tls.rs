//! TLS of a daemon: the certificate it shows, whom it trusts, and why a handshake failed.
//!
//! A daemon has one certificate, which it shows as a server and as a client. The files of it are
//! followed: a new pair serves the next handshake, connections that are open keep theirs. Sessions
//! are not resumed, because a resumed session is not verified again. There is no way to skip
//! verification. A client's certificate is optional in the handshake; the routes demand it.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, InconsistentKeys, InvalidMessage, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use crate::follow::follow;
use crate::socket::Socket;

/// How long a peer may take to hear why its handshake failed.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Why the settings of TLS do not hold. Each names the variable.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{variable}: {path} cannot be read")]
    Unreadable {
        variable: String,
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("{variable}: {path} is no PEM file")]
    Pem {
        variable: String,
        path: String,
        #[source]
        source: pem::Error,
    },
    #[error("{variable}: {path} holds no certificate")]
    NoCertificate { variable: String, path: String },
    #[error("{variable}: {path} holds no private key")]
    NoKey { variable: String, path: String },
    #[error("{variable}: {path} holds a certificate that cannot be used")]
    Certificate {
        variable: String,
        path: String,
        #[source]
        source: rustls::Error,
    },
    #[error("{variable}: {path} holds a private key that cannot be used")]
    Key {
        variable: String,
        path: String,
        #[source]
        source: rustls::Error,
    },
    #[error("{variable}: {path} holds the key of another certificate than {cert}")]
    OtherKey { variable: String, path: String, cert: String },
    #[error("{missing}: required, because {given} is set")]
    Half { given: String, missing: String },
    #[error("{variable}: {path} holds a certificate that can sign no other")]
    Authority {
        variable: String,
        path: String,
        #[source]
        source: rustls::Error,
    },
}

/// The settings: each `<PREFIX>_TLS_…` with the daemon's prefix.
#[derive(Debug, Clone, Default)]
pub struct TlsPaths {
    /// `_TLS_CERT`: the certificate of this daemon, the leaf first.
    pub cert: Option<PathBuf>,
    /// `_TLS_KEY`: its key.
    pub key: Option<PathBuf>,
    /// `_TLS_CLIENT_CA`: who signs the certificates of clients.
    pub client_ca: Option<PathBuf>,
    /// `_TLS_CA`: who signs the certificates of servers that are called; unset: the platform's roots.
    pub ca: Option<PathBuf>,
}

/// The TLS of a daemon.
#[derive(Debug)]
pub struct Tls {
    /// Absent: plain HTTP is served, and no certificate is shown to servers.
    pub own: Option<Arc<OwnCertificate>>,
    pub server: Option<Arc<ServerTls>>,
    pub client: ClientTls,
}

impl Tls {
    /// `prefix` is that of the daemon's variables, without an underscore at its end.
    pub fn load(prefix: &str, paths: &TlsPaths) -> Result<Self, TlsError> {
        let half = |given: &str, missing: &str| TlsError::Half {
            given: format!("{prefix}_TLS_{given}"),
            missing: format!("{prefix}_TLS_{missing}"),
        };
        let own = match (&paths.cert, &paths.key) {
            (Some(cert), Some(key)) => Some(Arc::new(OwnCertificate::load(prefix, cert, key)?)),
            (Some(_), None) => return Err(half("CERT", "KEY")),
            (None, Some(_)) => return Err(half("KEY", "CERT")),
            (None, None) if paths.client_ca.is_some() => return Err(half("CLIENT_CA", "CERT")),
            (None, None) => None,
        };
        let server = match &own {
            Some(own) => {
                let server = ServerTls::new(prefix, Arc::clone(own), paths.client_ca.as_deref())?;
                Some(Arc::new(server))
            }
            None => None,
        };
        let client = ClientTls::new(prefix, paths.ca.as_deref(), own.clone())?;
        Ok(Self { own, server, client })
    }
}

/// A file that a variable names.
#[derive(Debug, Clone)]
struct Named {
    variable: String,
    path: PathBuf,
}

impl Named {
    fn new(prefix: &str, rest: &str, path: &Path) -> Self {
        Self { variable: format!("{prefix}_TLS_{rest}"), path: path.to_owned() }
    }

    fn path(&self) -> String {
        self.path.display().to_string()
    }

    fn unreadable(&self, source: io::Error) -> TlsError {
        TlsError::Unreadable { variable: self.variable.clone(), path: self.path(), source }
    }

    fn certificates(&self, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let (variable, path) = (self.variable.clone(), self.path());
        match found {
            Ok(found) if found.is_empty() => Err(TlsError::NoCertificate { variable, path }),
            Ok(found) => Ok(found),
            Err(source) => Err(TlsError::Pem { variable, path, source }),
        }
    }

    fn authorities(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let pem = std::fs::read(&self.path).map_err(|source| self.unreadable(source))?;
        let mut roots = RootCertStore::empty();
        for certificate in self.certificates(&pem)? {
            roots.add(certificate).map_err(|source| TlsError::Authority {
                variable: self.variable.clone(),
                path: self.path(),
                source,
            })?;
        }
        Ok(Arc::new(roots))
    }
}

/// The certificate and key of a daemon, as the files have them now.
pub struct OwnCertificate {
    cert: Named,
    key: Named,
    now: RwLock<Arc<CertifiedKey>>,
    /// What was found in the files last.
    reported: Mutex<Result<Pair, UnusableFiles>>,
}

/// Why a pair of files cannot be used, with its causes. A text, because what is found is compared with
/// what was found before, which errors of reading cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
struct UnusableFiles(String);

impl From<TlsError> for UnusableFiles {
    fn from(error: TlsError) -> Self {
        Self(with_causes(&error))
    }
}

/// The text of both files.
#[derive(Clone, PartialEq, Eq)]
struct Pair {
    cert: Vec<u8>,
    key: Vec<u8>,
}

impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnCertificate({})", self.cert.path.display())
    }
}

impl OwnCertificate {
    pub fn load(prefix: &str, cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let (cert, key) = (Named::new(prefix, "CERT", cert), Named::new(prefix, "KEY", key));
        let pair = Pair {
            cert: std::fs::read(&cert.path).map_err(|source| cert.unreadable(source))?,
            key: std::fs::read(&key.path).map_err(|source| key.unreadable(source))?,
        };
        let now = RwLock::new(Arc::new(certified(&cert, &key, &pair)?));
        Ok(Self { cert, key, now, reported: Mutex::new(Ok(pair)) })
    }

    /// When the one in use expires; nothing where it does not say so.
    pub fn expires(&self) -> Option<Timestamp> {
        let now = Arc::clone(&self.now.read());
        let (_, leaf) = x509_parser::parse_x509_certificate(now.cert.first()?).ok()?;
        Timestamp::from_second(leaf.validity().not_after.timestamp()).ok()
    }

    /// Takes new contents of the files over, until `stop`. What cannot be used changes nothing, and
    /// the log says why.
    pub async fn follow(self: Arc<Self>, stop: CancellationToken) {
        let read = || async { self.read().await.map_err(UnusableFiles::from) };
        follow(&self.reported, stop, read, |found, is_new| self.take(found, is_new)).await;
    }

    fn take(&self, found: &Result<Pair, UnusableFiles>, is_new: bool) {
        let usable = found
            .as_ref()
            .map_err(UnusableFiles::clone)
            .and_then(|pair| Ok(certified(&self.cert, &self.key, pair)?));
        match usable {
            Ok(_) if !is_new => {
                tracing::info!(
                    path = self.cert.path(),
                    "the certificate was read again: it is the one in use"
                );
            }
            Ok(new) => {
                *self.now.write() = Arc::new(new);
                tracing::info!(path = self.cert.path(), "a new certificate is in use");
            }
            Err(UnusableFiles(error)) => {
                tracing::error!(error, "the certificate is not renewed: the old one stays");
            }
        }
    }

    async fn read(&self) -> Result<Pair, TlsError> {
        let cert = tokio::fs::read(&self.cert.path).await.map_err(|source| self.cert.unreadable(source))?;
        let key = tokio::fs::read(&self.key.path).await.map_err(|source| self.key.unreadable(source))?;
        Ok(Pair { cert, key })
    }

    fn current(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.now.read())
    }
}

fn certified(cert: &Named, key: &Named, pair: &Pair) -> Result<CertifiedKey, TlsError> {
    let chain = cert.certificates(&pair.cert)?;
    let (variable, path) = (key.variable.clone(), key.path());
    let private = match PrivateKeyDer::from_pem_slice(&pair.key) {
        Ok(private) => private,
        Err(pem::Error::NoItemsFound) => return Err(TlsError::NoKey { variable, path }),
        Err(source) => return Err(TlsError::Pem { variable, path, source }),
    };
    let private = match provider().key_provider.load_private_key(private) {
        Ok(private) => private,
        Err(source) => return Err(TlsError::Key { variable, path, source }),
    };
    let certified = CertifiedKey::new(chain, private);
    match certified.keys_match() {
        Ok(()) => Ok(certified),
        Err(rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch)) => {
            Err(TlsError::OtherKey { variable, path, cert: cert.path() })
        }
        Err(source) => {
            Err(TlsError::Certificate { variable: cert.variable.clone(), path: cert.path(), source })
        }
    }
}

impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

const RING_VERSIONS: &str = "ring has the suites of TLS 1.2 and 1.3";

/// Serving over TLS.
pub struct ServerTls {
    acceptor: TlsAcceptor,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

impl ServerTls {
    /// Without `client_ca` no client certificate is asked for.
    pub fn new(prefix: &str, own: Arc<OwnCertificate>, client_ca: Option<&Path>) -> Result<Self, TlsError> {
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .expect(RING_VERSIONS);
        let builder = match client_ca {
            None => builder.with_no_client_auth(),
            Some(path) => {
                let roots = Named::new(prefix, "CLIENT_CA", path).authorities()?;
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
                    .allow_unauthenticated()
                    .build()
                    .expect("there are roots and no revocation lists");
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder.with_cert_resolver(own);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    pub(crate) async fn accept(
        &self,
        stream: Socket,
    ) -> io::Result<(TlsStream<Socket>, Option<PeerCertificate>)> {
        let stream = match self.acceptor.accept(stream).into_fallible().await {
            Ok(stream) => stream,
            Err((error, stream)) => {
                last_word(stream).await;
                return Err(error);
            }
        };
        let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names);
        Ok((stream, certificate))
    }
}

/// Closes the socket so that the alert arrives: closed with bytes unread, it would be reset.
async fn last_word(mut stream: Socket) {
    let reading = async {
        let mut unread = [0; 4096];
        stream.shutdown().await?;
        while stream.read(&mut unread).await? > 0 {}
        io::Result::Ok(())
    };
    // Whether the peer heard it is its own affair.
    let _ = tokio::time::timeout(LAST_WORD, reading).await;
}

/// Whether a certificate can carry the name so that a server recognises it. A node id need not be
/// one: its last label must not be a number.
pub fn is_name(name: &str) -> bool {
    DnsName::try_from(name).is_ok()
}

/// A client certificate that was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCertificate {
    /// The DNS names it was issued for, as written, without those that have a wildcard.
    pub names: Vec<String>,
}

impl PeerCertificate {
    pub(crate) fn is_for(&self, name: &str) -> bool {
        self.names.iter().any(|own| own.eq_ignore_ascii_case(name))
    }
}

fn names(certificate: &CertificateDer<'_>) -> PeerCertificate {
    // A verified certificate was parsed before.
    let names = webpki::EndEntityCert::try_from(certificate)
        .map(|leaf| leaf.valid_dns_names().map(str::to_owned).collect())
        .unwrap_or_default();
    PeerCertificate { names }
}

/// Calling over TLS. Plain `http://` is called as well.
#[derive(Debug, Clone)]
pub struct ClientTls {
    config: ClientConfig,
}

impl ClientTls {
    /// Trusts the CA of the file and no other, or else the platform's.
    pub fn new(prefix: &str, ca: Option<&Path>, own: Option<Arc<OwnCertificate>>) -> Result<Self, TlsError> {
        use rustls_platform_verifier::BuilderVerifierExt;
        let builder = || {
            ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .expect(RING_VERSIONS)
        };
        let builder = match ca {
            Some(path) => {
                let roots = Named::new(prefix, "CA", path).authorities()?;
                builder().with_root_certificates(roots)
            }
            None => builder().with_platform_verifier().unwrap_or_else(|error| {
                tracing::warn!(%error, "this machine has no CA certificates: https:// needs {prefix}_TLS_CA");
                builder().with_root_certificates(RootCertStore::empty())
            }),
        };
        let mut config = match own {
            Some(own) => builder.with_client_cert_resolver(own),
            None => builder.with_no_client_auth(),
        };
        config.resumption = Resumption::disabled();
        Ok(Self { config })
    }

    pub fn config(&self) -> &ClientConfig {
        &self.config
    }

    /// Makes a reqwest client call with this trust and certificate.
    pub fn reqwest(&self, builder: reqwest::ClientBuilder) -> reqwest::ClientBuilder {
        builder.tls_backend_preconfigured(self.config.clone())
    }

    /// For a hyper client, HTTP/1.1. `within` bounds connecting and handshake together.
    pub fn connector(&self, mut http: HttpConnector, within: Duration) -> Connector {
        http.enforce_http(false);
        let inner = HttpsConnectorBuilder::new()
            .with_tls_config(self.config.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        Connector { inner, within }
    }
}

/// Connects over TCP or TLS, in bounded time.
#[derive(Debug, Clone)]
pub struct Connector {
    inner: HttpsConnector<HttpConnector>,
    within: Duration,
}

type BoxError = Box<dyn Error + Send + Sync>;

impl tower::Service<Uri> for Connector {
    type Response = MaybeHttpsStream<TokioIo<TcpStream>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = tokio::time::timeout(self.within, self.inner.call(uri));
        Box::pin(async move {
            connecting.await.unwrap_or_else(|_| Err("connecting did not finish in time".into()))
        })
    }
}

/// Why a call or a handshake failed: the reason in plain words when TLS is it, else the error
/// with its causes.
pub fn explain(error: &(dyn Error + 'static)) -> String {
    let text = with_causes(error);
    match tls_cause(error).and_then(plain) {
        Some(plain) => format!("{plain} ({text})"),
        None => text,
    }
}

/// Whether a server ended the handshake because of our certificate: it has read no request. With
/// TLS 1.3 a client hears of it only after it has sent one, so this is no error of connecting.
pub fn is_refused(error: &(dyn Error + 'static)) -> bool {
    use AlertDescription as A;
    matches!(
        tls_cause(error),
        Some(rustls::Error::AlertReceived(
            A::UnknownCA
                | A::CertificateExpired
                | A::BadCertificate
                | A::UnsupportedCertificate
                | A::CertificateRevoked
                | A::CertificateUnknown
                | A::CertificateRequired
                | A::DecryptError
                | A::AccessDenied
        ))
    )
}

fn tls_cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(found) = cause.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // The source of an I/O error is its inner error's source: the inner one would be skipped.
        next = match cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => cause.source(),
        };
    }
    None
}

fn plain(error: &rustls::Error) -> Option<String> {
    use CertificateError as Bad;
    let text = match error {
        rustls::Error::InvalidCertificate(bad) => match bad {
            Bad::UnknownIssuer => "its certificate is from a CA that is not trusted here",
            Bad::Expired | Bad::ExpiredContext { .. } => "its certificate has expired",
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => "its certificate is not valid yet",
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                "its certificate is for another name"
            }
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => {
                "its certificate is not meant for this side of a connection"
            }
            _ => "its certificate is not accepted",
        },
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA => "it does not trust the CA of our certificate",
            AlertDescription::CertificateExpired => "our certificate has expired or is not valid yet",
            AlertDescription::BadCertificate => {
                "it does not accept our certificate, most likely because of its names"
            }
            AlertDescription::UnsupportedCertificate => {
                "our certificate is not meant for this side of a connection"
            }
            AlertDescription::CertificateRequired => "it demands a certificate of ours",
            _ => return None,
        },
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => "it does not speak TLS",
        _ => return None,
    };
    Some(text.to_owned())
}

fn with_causes(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
