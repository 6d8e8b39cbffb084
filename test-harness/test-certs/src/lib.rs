//! Certificates for trying TLS out and for tests: a CA of one's own and what it signs.
//!
//! Not for production: the CA's key lies beside its certificates.

use std::path::Path;

use atomic_file::WriteError;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls_pki_types::DnsName;
use time::{Duration, OffsetDateTime};

/// How long a leaf is valid.
const LEAF_DAYS: i64 = 90;
/// How long the CA is valid.
const CA_DAYS: i64 = 3650;
/// The clocks of two machines may differ by this.
const CLOCK_SKEW: Duration = Duration::hours(1);

/// Why no certificate was made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    #[error("{name:?} is no name of a certificate")]
    Certificate {
        name: String,
        #[source]
        source: rcgen::Error,
    },
    #[error("{0:?} cannot be the name of a node in a certificate: it is no DNS name")]
    Node(String),
    #[error("{0:?} is a host and the name of a daemon: each certificate would be good for it")]
    HostIsDaemon(String),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// A certificate and its key, PEM.
#[derive(Clone)]
pub struct Pem {
    pub cert: String,
    pub key: String,
}

impl std::fmt::Debug for Pem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pem")
    }
}

/// When a leaf is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    Now,
    Expired,
    NotYet,
}

/// A CA that was made for this occasion.
#[derive(Debug)]
pub struct TestCa {
    pem: Pem,
    issuer: Issuer<'static, KeyPair>,
}

impl TestCa {
    pub fn new(name: &str) -> Result<Self, CertsError> {
        let wrong = |source| CertsError::Certificate { name: name.to_owned(), source };
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = OffsetDateTime::now_utc() - CLOCK_SKEW;
        params.not_after = params.not_before + Duration::days(CA_DAYS);
        let key = KeyPair::generate().map_err(wrong)?;
        let cert = params.self_signed(&key).map_err(wrong)?;
        let pem = Pem { cert: cert.pem(), key: key.serialize_pem() };
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// The CA's own certificate and key.
    pub fn pem(&self) -> &Pem {
        &self.pem
    }

    /// Signs a leaf for servers and clients. The names are DNS names or IP addresses; the first
    /// is also the subject.
    pub fn leaf(&self, names: &[&str], validity: Validity) -> Result<Pem, CertsError> {
        let subject = names.first().copied().unwrap_or_default();
        let wrong = |source| CertsError::Certificate { name: subject.to_owned(), source };
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).map_err(wrong)?;
        params.distinguished_name = common_name(subject);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let now = OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = match validity {
            Validity::Now => (now - CLOCK_SKEW, now + Duration::days(LEAF_DAYS)),
            Validity::Expired => (now - Duration::days(LEAF_DAYS), now - Duration::days(1)),
            Validity::NotYet => (now + Duration::days(1), now + Duration::days(LEAF_DAYS)),
        };
        let key = KeyPair::generate().map_err(wrong)?;
        let cert = params.signed_by(&key, &self.issuer).map_err(wrong)?;
        Ok(Pem { cert: cert.pem(), key: key.serialize_pem() })
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

/// Fills the directory: `ca`, `orchestratord` and each node, as `<name>.pem` and `<name>-key.pem`.
/// Every leaf is also for the hosts. What was there is replaced.
pub fn write_cluster(out: &Path, nodes: &[String], hosts: &[String]) -> Result<(), CertsError> {
    if let Some(wrong) = nodes.iter().find(|node| DnsName::try_from(node.as_str()).is_err()) {
        return Err(CertsError::Node(wrong.clone()));
    }
    let is_daemon = |host: &&String| host.as_str() == "orchestratord" || nodes.contains(host);
    if let Some(host) = hosts.iter().find(is_daemon) {
        return Err(CertsError::HostIsDaemon(host.clone()));
    }
    let ca = TestCa::new("llama-orch test CA")?;
    write(out, "ca", ca.pem())?;
    for name in std::iter::once("orchestratord").chain(nodes.iter().map(String::as_str)) {
        let names: Vec<&str> = std::iter::once(name).chain(hosts.iter().map(String::as_str)).collect();
        write(out, name, &ca.leaf(&names, Validity::Now)?)?;
    }
    Ok(())
}

/// Writes a pair into the directory; a reader sees each file whole.
pub fn write(out: &Path, name: &str, pem: &Pem) -> Result<(), CertsError> {
    let replace =
        |name: String, text: &str, mode| atomic_file::replace(&out.join(name), text.as_bytes(), mode);
    replace(format!("{name}.pem"), &pem.cert, atomic_file::PUBLIC)?;
    Ok(replace(format!("{name}-key.pem"), &pem.key, atomic_file::OWNER_ONLY)?)
}
