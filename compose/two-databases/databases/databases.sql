-- A database, and a role that owns it, for each service. psql reads the passwords from the secrets.
\set password `cat /run/secrets/shop_password`
CREATE ROLE shop LOGIN PASSWORD :'password';
CREATE DATABASE shop OWNER shop;
REVOKE ALL ON DATABASE shop FROM PUBLIC;

\set password `cat /run/secrets/billing_password`
CREATE ROLE billing LOGIN PASSWORD :'password';
CREATE DATABASE billing OWNER billing;
REVOKE ALL ON DATABASE billing FROM PUBLIC;
