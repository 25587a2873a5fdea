-- A database of the tuner as it was before Alembic, with two winners, one of them in quarantine, and two measurements.
BEGIN TRANSACTION;
CREATE TABLE adasplash_best (
	key_id INTEGER NOT NULL, 
	config TEXT NOT NULL, 
	median_ms FLOAT NOT NULL, 
	spread_ms FLOAT NOT NULL, 
	default_ms FLOAT NOT NULL, 
	error FLOAT NOT NULL, 
	shape TEXT NOT NULL, 
	inputs TEXT NOT NULL, 
	samples INTEGER NOT NULL, 
	measured_at BIGINT NOT NULL, 
	version VARCHAR NOT NULL, 
	quarantined TEXT NOT NULL, 
	PRIMARY KEY (key_id), 
	FOREIGN KEY(key_id) REFERENCES adasplash_keys (id) ON DELETE CASCADE
);
INSERT INTO "adasplash_best" VALUES(1,'{"block_n":128,"iterations":8}',1.0,0.01,1.5,0.001,'B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal','random, moderate',9,1750000000,'0.1.0','');
INSERT INTO "adasplash_best" VALUES(2,'{"block_n":64,"iterations":8}',1.0,0.01,1.5,0.001,'B=1,H=32,Hkv=8,L=8192,D=128,bfloat16,causal','random, moderate',9,1750000000,'0.1.0','spills');
CREATE TABLE adasplash_keys (
	id INTEGER NOT NULL, 
	backend VARCHAR NOT NULL, 
	pass_ VARCHAR NOT NULL, 
	dtype VARCHAR NOT NULL, 
	head_dim INTEGER NOT NULL, 
	head_dim_v INTEGER NOT NULL, 
	q_bucket BIGINT NOT NULL, 
	kv_bucket BIGINT NOT NULL, 
	batch_heads_bucket INTEGER NOT NULL, 
	gqa_bucket INTEGER NOT NULL, 
	causal BOOLEAN NOT NULL, 
	mask_class VARCHAR NOT NULL, 
	alpha_class VARCHAR NOT NULL, 
	deterministic BOOLEAN NOT NULL, 
	device_type VARCHAR NOT NULL, 
	device_name VARCHAR NOT NULL, 
	capability VARCHAR NOT NULL, 
	multiprocessors INTEGER NOT NULL, 
	code_hash VARCHAR NOT NULL, 
	space_version VARCHAR NOT NULL, 
	toolchain VARCHAR NOT NULL, 
	readable TEXT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT adasplash_keys_unique UNIQUE (backend, pass_, dtype, head_dim, head_dim_v, q_bucket, kv_bucket, batch_heads_bucket, gqa_bucket, causal, mask_class, alpha_class, deterministic, device_type, device_name, capability, multiprocessors, code_hash, space_version, toolchain)
);
INSERT INTO "adasplash_keys" VALUES(1,'fake','forward','bfloat16',128,128,8192,8192,64,4,1,'plain','1.5',0,'cuda','NVIDIA H100 80GB HBM3','9.0',132,'c0de','03ee6b9b','compiler 1, cuda 13.0, driver 580.1','fake forward: bfloat16 D=128, Lq~8192 Lk~8192 B*H~64 H/Hkv~4, causal, mask plain, alpha 1.5 | cuda NVIDIA H100 80GB HBM3 (9.0), 132 SMs | code c0de, space 03ee6b9b, toolchain compiler 1, cuda 13.0, driver 580.1');
INSERT INTO "adasplash_keys" VALUES(2,'fake','forward','bfloat16',128,128,8192,1024,64,4,1,'plain','1.5',0,'cuda','NVIDIA H100 80GB HBM3','9.0',132,'c0de','03ee6b9b','compiler 1, cuda 13.0, driver 580.1','fake forward: bfloat16 D=128, Lq~8192 Lk~1024 B*H~64 H/Hkv~4, causal, mask plain, alpha 1.5 | cuda NVIDIA H100 80GB HBM3 (9.0), 132 SMs | code c0de, space 03ee6b9b, toolchain compiler 1, cuda 13.0, driver 580.1');
CREATE TABLE adasplash_measurements (
	id INTEGER NOT NULL, 
	key_id INTEGER NOT NULL, 
	config TEXT NOT NULL, 
	shape TEXT NOT NULL, 
	inputs TEXT NOT NULL, 
	stage VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	measured_at BIGINT NOT NULL, 
	version VARCHAR NOT NULL, 
	median_ms FLOAT, 
	spread_ms FLOAT, 
	samples INTEGER NOT NULL, 
	error FLOAT, 
	note TEXT NOT NULL, 
	PRIMARY KEY (id), 
	FOREIGN KEY(key_id) REFERENCES adasplash_keys (id) ON DELETE CASCADE
);
INSERT INTO "adasplash_measurements" VALUES(1,1,'{"block_n":128}','s','i','final','ok',1,'0.1.0',1.0,0.1,3,0.001,'');
INSERT INTO "adasplash_measurements" VALUES(2,1,'{"block_n":512}','s','i','screening','failed',1,'0.1.0',NULL,NULL,0,NULL,'out of shared memory');
CREATE TABLE adasplash_meta (
	name VARCHAR(100) NOT NULL, 
	value TEXT NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "adasplash_meta" VALUES('schema_version','1');
CREATE INDEX ix_adasplash_measurements_key_id ON adasplash_measurements (key_id);
COMMIT;
