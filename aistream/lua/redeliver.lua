-- Has a callback delivered again: due now, with the whole schedule before it.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 origins zset, 5 owed zset, 6 dead zset
-- ARGV  1 id, 2 'any': whoever owns it, 'own': only the subject's, 3 the subject, 4 seconds to keep what is owed
-- gives 'missing' | 'not_ended' | 'delivered' | 'gone' (its content is no longer kept) | 'trying' (an attempt is being made) | 'owed'
-- Atomic: a callback is either dead or owed. One that is being attempted stays as it is: due now, another worker would send it too.
local s = redis.call('HMGET', KEYS[1], 'state', 'callback', 'subject', 'origin', 'attempt', 'open', 'ended_at')
if not s[1] or ARGV[2] == 'own' and s[3] ~= ARGV[3] then
  return 'missing'
end
if not ENDED[s[1]] then
  return 'not_ended'
end
if s[2] == 'delivered' then
  return 'delivered'
end
if redis.call('EXISTS', KEYS[3]) == 0 then
  return 'gone'
end
local now = now_ms()
local due = redis.call('ZSCORE', KEYS[4] .. ':' .. s[4], ARGV[1])
if s[2] == 'owed' and s[6] == '1' and due and tonumber(due) > now then
  return 'trying'
end
redis.call('HSET', KEYS[1], 'callback', 'owed', 'before', s[5])
redis.call('HDEL', KEYS[1], 'running_since', 'settled_at')
redis.call('ZREM', KEYS[6], ARGV[1])
redis.call('ZADD', KEYS[5], s[7], ARGV[1])
owe(KEYS[4], s[4], ARGV[1], now)
for i = 1, 3 do
  if redis.call('TTL', KEYS[i]) < tonumber(ARGV[4]) then
    redis.call('EXPIRE', KEYS[i], ARGV[4])
  end
end
return 'owed'
